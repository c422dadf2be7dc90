"""Recipes that train several times, in stages or rounds: trained whole, and asked questions at the end."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmkd.errors import UserError
from mmkd.files import write_file
from mmkd.recipe.recipe import Recipe
from mmkd.recipe.stages import Stage, plan
from mmkd.results.compared import ComparedModel
from mmkd.results.cost import Stopwatch
from mmkd.training.log import hours_of_steps, logs_in
from mmkd.training.method import Train

from .asked_questions import Questions
from .baselines import comparison_of, distils, teacher_of
from .model import find_model

SPENT = "spent.json"
"""File of the folder of such a recipe: seconds and hours of all sessions."""


def measure_whole(recipe: Recipe, stage: str, folder: Path, questions: Questions, train: Train) -> ComparedModel:
    """Asks the teacher of a recipe that trains several times, or its last student, which is trained first.

    Raises KeyboardInterrupt where a training was interrupted.
    """
    if stage == "teacher":
        name = teacher_of(recipe)
        assert name is not None
        parameters, metrics, items = questions.measure(name)
        return ComparedModel(stage, name, parameters, metrics, items, measured_on=questions.source)
    run = recipe.with_(output_dir=str(folder), **({"push_to_hub": False} if recipe.keys.get("push_to_hub") else {}))
    stages = plan(run) if run.in_stages else []
    last = stages[-1].folder if stages else folder
    comparison = comparison_of(recipe)
    share_stages(stages, folder.parent)
    watch = Stopwatch()
    try:
        status = train(run)
    finally:
        cost = _with_earlier(folder, watch.cost())
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise UserError(f"The training of {recipe.name} ended with status {status}; what it said is above.")
    keep_stages(stages, folder.parent)
    parameters, metrics, items = questions.measure(last)
    ways = {} if comparison.along is None or not distils(recipe) else comparison.along(last)
    first = next(iter(metrics))
    along = {title: questions.measure(student)[1][first] for title, student in ways.items()}
    tokens = sum(_tokens(stage.folder) for stage in stages) if stages else _tokens(folder)
    asked = None if comparison.teacher_tokens is None or not distils(recipe) else comparison.teacher_tokens(last)
    cost |= {"tokens_per_second": tokens / max(cost["seconds"], 1e-9), "teacher_tokens": asked}
    # Of all stages, also of those that another schedule has trained.
    hours = [hours_of_steps(trained) for trained in ([stage.folder for stage in stages] or [folder])]
    cost["step_hours"] = None if None in hours else sum(filter(None, hours))
    weights = find_model(str(last)).weights
    return ComparedModel(
        stage,
        str(last),
        parameters,
        metrics,
        items,
        tokens,
        cost,
        weights=weights,
        measured_on=questions.source,
        along=along,
    )


def share_stages(stages: Sequence[Stage], output: Path) -> None:
    """Links stages that an earlier schedule has trained in the same way."""
    for stage in stages:
        known = output / "stages" / stage.identity
        if known.exists() and not stage.folder.exists():
            stage.folder.parent.mkdir(parents=True, exist_ok=True)
            stage.folder.symlink_to(os.path.relpath(known.resolve(), stage.folder.parent.resolve()))


def keep_stages(stages: Sequence[Stage], output: Path) -> None:
    """Lets later schedules find these stages."""
    for stage in stages:
        known = output / "stages" / stage.identity
        known.parent.mkdir(parents=True, exist_ok=True)
        if not known.exists():
            known.symlink_to(os.path.relpath(stage.folder.resolve(), known.parent.resolve()))


def _with_earlier(folder: Path, cost: dict[str, Any]) -> dict[str, Any]:
    """The cost of all sessions: of this one, and of those before it that were interrupted."""
    path = folder / SPENT
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    spent = {name: before.get(name, 0.0) + cost[name] for name in ("seconds", "hours")}
    write_file(path, json.dumps(spent))
    return {**cost, **spent}


def _tokens(folder: Path) -> int:
    """Supervised tokens of the trainings in a folder."""
    counted = [[entry.get("supervised_tokens") for entry in log] for log in logs_in(folder)]
    return int(sum(max((count for count in counts if count is not None), default=0) for counts in counted))
