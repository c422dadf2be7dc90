"""What a loop of comd is compared with: SFT for as many updates, and loops without one of its parts."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmkd.training.comparison import Comparison, Control
from mmkd.training.log import LOG

from .round_plot import plot_rounds
from .round_recipes import STUDENT
from .round_report import read_rounds

_UNGUIDED = {"assessor": "none", "augmentor": "none"}


def _baseline(recipe: Any, folder: Path) -> dict[str, Any]:
    """SFT on the data's own answers, for as many updates as all rounds together."""
    return {"max_steps": _updates(folder)}


def _in_rounds(recipe: Any, folder: Path) -> list[dict[str, Any]]:
    return [{**_UNGUIDED, "max_train_rows": _answers(folder)}]


def _one_shot(recipe: Any, folder: Path) -> list[dict[str, Any]]:
    return [{**_UNGUIDED, "max_train_rows": _answers(folder), "rounds": 0, "max_steps": _updates(folder)}]


def _answers(folder: Path) -> int:
    """How many answers of the teacher the pool ended with."""
    return read_rounds(folder)[-1]["pool"]


def _updates(folder: Path) -> int:
    """Optimizer steps of all rounds."""
    logs = [path.read_text(encoding="utf-8").splitlines() for path in folder.glob(f"round-*/*/{LOG}")]
    return sum(json.loads(log[-1])["max_steps"] for log in logs)


def _rounds(folder: Path) -> dict[str, Path]:
    """The student of every round."""
    numbers = [report["round"] for report in read_rounds(folder)]
    return {f"round {number}": folder / f"round-{number}" / STUDENT for number in numbers}


def _teacher_tokens(folder: Path) -> int:
    return read_rounds(folder)[-1]["teacher_tokens"]


def _plot(runs: Mapping[str, Sequence[Path]], output: Path) -> Path | None:
    """How hard the pool is, how good student and teacher are, and how the pool grows, of the loops."""
    reports = {
        f"{name}#{seed}": read_rounds(folder)
        for name, folders in runs.items()
        for seed, folder in enumerate(folders)
        if any(folder.glob("round-*/report.json"))
    }
    plot_rounds(reports, output / "rounds.png")
    return output / "rounds.png"


COMPARISON = Comparison(
    baseline=_baseline,
    controls={
        "random": Control(
            "new instructions that are made of no parents", lambda recipe, folder: [{"augmentor": "random"}]
        ),
        "unassessed": Control(
            "parents of new instructions drawn from the whole pool", lambda recipe, folder: [{"assessor": "none"}]
        ),
        "in_rounds": Control("as many of the data's own instructions, trained on in as many rounds", _in_rounds),
        "one_shot": Control("as many of the data's own instructions, trained on once", _one_shot),
    },
    repeats=lambda run: run.training.rounds,
    along=_rounds,
    teacher_tokens=_teacher_tokens,
    plot=_plot,
)
