"""Tasks of models, kept per model and printed side by side."""

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmkd.results.scores import scores_of
from mmkd.units import readable_time

from .harness import Harness, Settings
from .lmms import check_lmms, lmms_key, lmms_settings, run_lmms
from .model import EvalModel
from .results import Results
from .suites import SuiteTask
from .tasks import Tasks


def evaluate(
    model: EvalModel, tasks: Sequence[SuiteTask], settings: Settings, output: Path | None = None, include: Any = ()
) -> list[dict[str, Any]]:
    """The entries of the tasks, in order: from the model's results where they are known, else by running them.

    Their `samples` are the paths of their answers. A task that needs vision is left out for a model without it. Every
    task is kept as soon as it is done. Raises UserError for unknown tasks, missing data and results of other weights,
    before anything runs where that is possible.
    """
    supported = [task for task in tasks if task.needs != "vision" or model.vision]
    for task in tasks:
        if task not in supported:
            print(f"{task.task} needs a vision-language model, which {model.name} is not: left out.", file=sys.stderr)
    results = Results.of(model, output)
    planned = _plan(model, supported, settings, include)
    if settings.chat_template == "auto" and not model.has_chat_template:
        print(f"{model.name} has no chat template: it is asked in plain text.", file=sys.stderr)
    known = [results.task(key) for _, key, _ in planned]
    progress = _Progress(model.name, [entry["seconds"] for entry in known if entry is not None], len(planned))
    progress.begin(results.folder)
    entries = []
    for (name, key, run), entry in zip(planned, known, strict=True):
        if entry is None:
            progress.say(name)
            begun = time.monotonic()
            outcome = run()
            if outcome is None:
                # Another rank of the same evaluation writes.
                continue
            facts, samples = outcome
            progress.seconds.append(time.monotonic() - begun)
            facts = {**facts, "seconds": progress.seconds[-1], "date": datetime.now(UTC).isoformat("T", "seconds")}
            entry = results.add_task(key, {**facts, "scores": scores_of(facts)}, samples)
        entries.append({**entry, "samples": str(results.folder / entry["samples"])})
    return entries


@dataclass
class _Progress:
    """Says which task of a model runs, and how long the others will take if they are like those that are finished."""

    model: str
    seconds: list[float]
    """Of each finished task."""
    total: int

    def begin(self, folder: Path) -> None:
        """Says what an earlier session finished, where something is left to do."""
        if 0 < len(self.seconds) < self.total:
            text = f"{len(self.seconds)} of {self.total} tasks are finished already and kept in {folder}."
            print(f"{self.model}: {text}", file=sys.stderr)

    def say(self, task: str) -> None:
        """Announces a task."""
        finished = len(self.seconds)
        left = ""
        if finished:
            mean = statistics.fmean(self.seconds)
            left = f", about {readable_time(mean * (self.total - finished))} left"
        print(f"{self.model}, {task}: task {finished + 1} of {self.total}{left}", file=sys.stderr)


def _plan(
    model: EvalModel, tasks: Sequence[SuiteTask], settings: Settings, include: Any
) -> list[tuple[str, str, Any]]:
    """The name and the key of every task, and how to run it."""
    own = [task for task in tasks if task.harness == "lm-eval"]
    known = Tasks([task.task for task in own], include) if own else None
    harness = Harness(model, settings)
    if len(own) < len(tasks):
        check_lmms()
    planned: list[tuple[str, str, Any]] = []
    for task in tasks:
        if task.harness == "lmms-eval":
            chosen = lmms_settings(model, settings)
            planned.append((task.task, lmms_key(task, chosen), partial(run_lmms, task, chosen)))
            continue
        assert known is not None
        for facts in [known[name] for name in known.matching(task.task)]:
            planned.append((facts.name, harness.key(task, facts), partial(harness.run, task, facts, known.manager)))
    return planned


def show(results: Mapping[str, Sequence[Mapping[str, Any]]], console: Console) -> None:
    """One line per task, one column per model."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for name, entries in results.items():
        for score in (score for entry in entries for score in entry["scores"]):
            sign = "↑" if score["higher_is_better"] else "↓"
            row = rows.setdefault((score["task"], f"{score['metric'].removesuffix(',none')} {sign}"), {})
            row[name] = f"{score['value']:.4f}" + ("" if score["stderr"] is None else f" ± {score['stderr']:.4f}")
            row["items"] = f"{score['items']:,}" if score["items"] is not None else ""
    table = Table("task", "metric", "items", *results)
    for (task, metric), row in rows.items():
        table.add_row(task, metric, row["items"], *(row.get(name, "") for name in results))
    console.print(table)
