"""Folders of results. Imports neither torch nor transformers, so that reports start fast."""

import hashlib
import re
from pathlib import Path

RECORD = "run.json"
"""The file in a run's folder that describes the run."""

RESULTS, COMPARISON = "eval/results.json", "comparison.json"


def results_folder(model: str | Path) -> Path:
    """The folder of `mmkd eval`'s results of a model: within the folder of a run, otherwise under runs/eval."""
    own = Path(model)
    if not own.is_dir():
        return Path("runs/eval", re.sub(r"[^\w.+@-]+", "--", str(model)).strip("-"))
    if _is_of_a_run(own):
        return own / "eval"
    # A hash of the absolute path distinguishes folders of the same name.
    place = own.resolve()
    return Path("runs/eval", f"{place.name}-{hashlib.sha256(str(place).encode()).hexdigest()[:8]}")


def results_before(model: str | Path) -> Path | None:
    """The folder with results of earlier versions of mmkd for a folder that no run made; None if there are none."""
    own = Path(model) / "eval"
    return own if (own / Path(RESULTS).name).is_file() and own != results_folder(model) else None


def _is_of_a_run(folder: Path) -> bool:
    """Whether a folder belongs to a run of mmkd: the run itself, or a checkpoint, stage, round or measured student."""
    places = [folder, *list(folder.resolve().parents)[:3]]
    return any((place / name).exists() for place in places for name in (RECORD, "stage.json", COMPARISON, "measured"))
