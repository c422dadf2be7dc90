"""What a finished run says: what it cost, its measures before and after, where the student is, and what comes next."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from mmkd.training.guard_settings import warnings_of
from mmkd.training.log_lines import measures_of
from mmkd.training.method import METHODS
from mmkd.training.run_trainer import RunTrainer
from mmkd.units import readable_time, with_noun

from .recipe import Run

_RESULTS = "eval_results.json"


def print_summary(trainer: RunTrainer) -> None:
    """Prints time, tokens and the measures of a training that is saved; on rank 0 only."""
    if not trainer.is_world_process_zero():
        return
    console, log = Console(), trainer.state.log_history
    console.print(f"\n{_cost(trainer)}", highlight=False, markup=False, soft_wrap=True)
    evaluations = [entry for entry in log if "eval_runtime" in entry]
    folder = Path(trainer.args.output_dir or ".")
    if (folder / _RESULTS).is_file():
        after = json.loads((folder / _RESULTS).read_text(encoding="utf-8"))
        earlier = [entry for entry in evaluations if entry["step"] < trainer.state.global_step]
        for line in _table(earlier[0] if earlier else None, after):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    for warning in warnings_of(log):
        console.print(f"Guard, {warning}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"The student is in {folder}", highlight=False, markup=False, soft_wrap=True)


def print_next_commands(run: Run, folder: Path) -> None:
    """Prints commands that go on from a finished run; `folder` is the whole run's, of which `run` is the last part."""
    console = Console()
    for command, purpose in next_commands(run, folder).items():
        console.print(f"\n{purpose}:\n    {command}", highlight=False, markup=False, soft_wrap=True)


def next_commands(run: Run, folder: Path) -> dict[str, str]:
    """Commands that work as they stand after a finished run, and what each is for."""
    commands = {_words("mmkd", "report", folder): "Curves, answers and settings on one page"}
    evaluation = _evaluation(run)
    if evaluation is not None:
        commands[evaluation] = "Measure the student on held-out rows"
    push = _words("mmkd", "push", folder, "--repo", "ORG/NAME", "--dry_run")
    commands[push] = "See the model card and the files that would be published"
    if len(commands) < 3 and _can_be_compared(run):
        commands[_words("mmkd", "compare", *run.recipe.command)] = "Compare with fine-tuning alone, at equal tokens"
    return commands


def _evaluation(run: Run) -> str | None:
    """The command that measures the student, where there are rows to measure on and `mmkd eval` knows such models."""
    arguments, student = run.arguments, Path(run.training.output_dir or ".")
    method = METHODS[arguments.method]
    if method.predicts != "tokens" or not (student / _RESULTS).is_file():
        return None
    words: list[Any] = ["mmkd", "eval", student, "--data", arguments.data]
    if arguments.teacher is None or arguments.teacher_revision is not None or not method.one_vocabulary:
        return _words(*words, "--measures", "calibration")
    return _words(*words, "--teacher", arguments.teacher, "--measures", "agreement", "calibration")


def _can_be_compared(run: Run) -> bool:
    method = METHODS[run.arguments.method]
    return bool(run.recipe.command) and method.predicts == "tokens" and method.needs_teacher and method.drive is None


def _words(*words: Any) -> str:
    return shlex.join(map(str, words))


def _cost(trainer: RunTrainer) -> str:
    log = trainer.state.log_history
    seconds = next((entry["train_runtime"] for entry in reversed(log) if "train_runtime" in entry), 0.0)
    tokens = next((entry["supervised_tokens"] for entry in reversed(log) if "supervised_tokens" in entry), None)
    learnt = "" if tokens is None else f", {tokens:,} supervised tokens"
    return f"Finished: {with_noun(trainer.state.global_step, 'step')} in {readable_time(seconds)}{learnt}."


def _table(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> list[str]:
    """The measures on held-out rows, of an earlier evaluation too where there was one."""
    now, then = measures_of(after, "eval"), {} if before is None else measures_of(before, "eval")
    title = "" if before is None else f"after step {before['step']}" if before["step"] else "before training"
    rows = [("held-out rows", title, "now"), *((label, then.get(label, ""), value) for label, value in now.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
