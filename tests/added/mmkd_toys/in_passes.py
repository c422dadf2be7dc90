"""A driver around trainings: kd again and again, each pass from the student that the one before left."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from mmkd.methods.kd import KDTrainer
from mmkd.preflight.dry_run import dry_run
from mmkd.recipe.run import Run, last_checkpoint, parse_run
from mmkd.training.config import DistillationConfig
from mmkd.training.method import Method, Train

WEIGHTS = "model.safetensors"


@dataclass
class InPassesConfig(DistillationConfig):
    """Settings of method in_passes."""

    passes: int = field(default=2, metadata={"help": "How many trainings there are, one after another."})


class InPassesTrainer(KDTrainer):
    """One pass, for Python."""

    method = "in_passes"
    config_class = InPassesConfig


def train_passes(run: Run, recipe: Path, flags: Sequence[str], train: Train) -> int:
    """Trains the passes that are not finished; the exit status of the first that fails, else 0."""
    folder = Path(run.training.output_dir or "runs")
    passes = run.training.passes  # pyright: ignore[reportAttributeAccessIssue]
    student = run.arguments.student
    for number in range(1, passes + 1):
        output = folder / f"pass-{number}"
        if not (output / WEIGHTS).is_file():
            resume = ["--resume_from_checkpoint", "true"] if last_checkpoint(output) else []
            status = train(str(write_pass(run, output, str(student))), resume)
            if status:
                return status
        student = str(output)
    shutil.copytree(str(student), folder, dirs_exist_ok=True)
    return 0


def dry_run_passes(run: Run, recipe: Path, flags: Sequence[str], console: Console) -> Any:
    """Prints how many passes there are, and what the first would do; returns its trainer."""
    console.print(f"{run.training.passes} passes")  # pyright: ignore[reportAttributeAccessIssue]
    output = Path(run.training.output_dir or "runs") / "pass-1"
    path = write_pass(run, output, str(run.arguments.student))
    return dry_run(parse_run(str(path)), path, [], console)


def write_pass(run: Run, output: Path, student: str) -> Path:
    """The recipe of one pass."""
    own = {"passes", "dry_run", "resume_from_checkpoint"}
    keys = {name: value for name, value in run.keys.items() if name not in own}
    path = output.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**keys, "method": "kd", "student": student, "output_dir": str(output)}))
    return path


METHOD = Method(InPassesTrainer, drive=train_passes, dry_run=dry_run_passes)
