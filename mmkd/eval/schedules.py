"""Schedules of a recipe in stages as they are written on the command line, such as `DPT-SFT-DFT:beta=0`."""

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from mmkd.errors import UserError
from mmkd.recipe.key_parser import parser_of
from mmkd.recipe.recipe import Recipe
from mmkd.training.method import BASELINE_METHOD

from .baselines import with_keys


def scheduled(recipe: Recipe, schedules: Sequence[str], output: Path) -> dict[str, Recipe]:
    """The recipe of each schedule, by its text.

    A schedule is stages joined by "-", with optional keys after ":", of every stage that distils by a method that has
    them, or of one stage (`DFT.beta=0`). Values are YAML: `features=[tower, projector]`. Raises UserError for a recipe
    without stages, and for what is no schedule of it.
    """
    if not recipe.in_stages:
        raise UserError(f"{recipe.name} has no stages, so it has one schedule only. Leave --schedules out.")
    return {text: _scheduled(recipe, text, output) for text in schedules}


def _scheduled(recipe: Recipe, text: str, output: Path) -> Recipe:
    names, _, settings = text.partition(":")
    for name in names.split("-"):
        recipe.stage(name)
    distilling = {name: recipe.stage(name).method for name in recipe.stages}
    distilling = {name: method for name, method in distilling.items() if method != BASELINE_METHOD}
    by_stages: dict[tuple[str, ...], dict[str, object]] = {}
    for setting in filter(None, _split(settings)):
        key, equals, value = setting.partition("=")
        stage, _, name = key.rpartition(".")
        if not equals or (stage and stage not in recipe.stages):
            raise UserError(
                f"--schedules {text}: {setting!r} is no setting. Write key=value for every stage that distils, or "
                f"STAGE.key=value for one of {', '.join(recipe.stages)}."
            )
        of_all = tuple(own for own, method in distilling.items() if name in parser_of(method).names)
        by_stages.setdefault((stage,) if stage else of_all or tuple(distilling), {})[name] = yaml.safe_load(value)
    tail = re.sub(r"[^\w.-]+", "-", settings.replace("=", "_"))
    for stages, keys in by_stages.items():
        recipe = with_keys(recipe, output / "schedules" / f"{names}-{tail}.yaml", keys, stages)
    return recipe.with_(schedule=names.split("-"))


def _split(settings: str) -> list[str]:
    """The settings between commas that stand in no brackets."""
    parts, depth = [""], 0
    for letter in settings:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
