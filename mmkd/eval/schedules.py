"""Schedules of a recipe in stages as they are written on the command line, such as `DPT-SFT-DFT:beta=0`."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from mmkd.errors import UserError
from mmkd.recipe.recipe import Recipe
from mmkd.training.method import BASELINE_METHOD

from .baselines import with_keys


def scheduled(recipe: Recipe, schedules: Sequence[str], output: Path) -> dict[str, Recipe]:
    """The recipe of each schedule, by its text.

    A schedule is stages joined by "-", with optional keys after ":", of every stage that distils or of one of them
    (`DFT.beta=0`). Raises UserError for a recipe without stages, and for what is no schedule of it.
    """
    if not recipe.in_stages:
        raise UserError(f"{recipe.name} has no stages, so it has one schedule only. Leave --schedules out.")
    return {text: _scheduled(recipe, text, output) for text in schedules}


def _scheduled(recipe: Recipe, text: str, output: Path) -> Recipe:
    names, _, settings = text.partition(":")
    for name in names.split("-"):
        recipe.stage(name)
    distilling = [name for name in recipe.stages if recipe.stage(name).method != BASELINE_METHOD]
    by_stages: dict[tuple[str, ...], dict[str, object]] = {}
    for setting in filter(None, settings.split(",")):
        key, equals, value = setting.partition("=")
        stage, _, name = key.rpartition(".")
        if not equals or (stage and stage not in recipe.stages):
            raise UserError(
                f"--schedules {text}: {setting!r} is no setting. Write key=value for every stage that distils, or "
                f"STAGE.key=value for one of {', '.join(recipe.stages)}."
            )
        by_stages.setdefault((stage,) if stage else tuple(distilling), {})[name] = yaml.safe_load(value)
    tail = "-".join(f"{key}" for key in settings.replace("=", "_").split(",") if key)
    for stages, keys in by_stages.items():
        recipe = with_keys(recipe, output / "schedules" / f"{names}-{tail}.yaml", keys, stages)
    return recipe.with_(schedule=names.split("-"))
