"""A driver around trainings: kd again and again, each pass from the student that the one before left."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from mmkd.methods.kd import KDTrainer
from mmkd.preflight.dry_run import dry_run
from mmkd.recipe.recipe import Recipe, Run
from mmkd.recipe.run import last_checkpoint
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


def train_passes(run: Run, train: Train) -> int:
    """Trains the passes that are not finished; the exit status of the first that fails, else 0."""
    folder = Path(run.training.output_dir or "runs")
    passes = run.training.passes  # pyright: ignore[reportAttributeAccessIssue]
    student = run.arguments.student
    for number in range(1, passes + 1):
        output = folder / f"pass-{number}"
        if not (output / WEIGHTS).is_file():
            recipe = write_pass(run, output, str(student))
            status = train(recipe.with_(resume_from_checkpoint=True) if last_checkpoint(output) else recipe)
            if status:
                return status
        student = str(output)
    shutil.copytree(str(student), folder, dirs_exist_ok=True)
    return 0


def dry_run_passes(run: Run, console: Console) -> Any:
    """Prints how many passes there are, and what the first would do; returns its trainer."""
    console.print(f"{run.training.passes} passes")  # pyright: ignore[reportAttributeAccessIssue]
    output = Path(run.training.output_dir or "runs") / "pass-1"
    return dry_run(write_pass(run, output, str(run.arguments.student)).parse(), console)


def write_pass(run: Run, output: Path, student: str) -> Recipe:
    """The recipe of one pass."""
    recipe = run.recipe.without("passes", "dry_run", "resume_from_checkpoint")
    return recipe.with_(method="kd", student=student, output_dir=str(output)).write(output.with_suffix(".yaml"))


METHOD = Method(InPassesTrainer, drive=train_passes, dry_run=dry_run_passes)
