"""The one place where tests of what 0.1 left behind reach into mmkd: what a recipe and flags mean, as plain values."""

import os
from collections.abc import Sequence
from enum import Enum
from typing import Any

from mmkd.recipe.flags import recipe_of
from mmkd.recipe.key_parser import KeyParser
from mmkd.recipe.launch_keys import launch_keys_of
from mmkd.recipe.recipe import Run
from mmkd.recipe.stages import plan


def values_of(name: str, flags: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The value of every key, by stage; of a recipe without stages under the name "".

    What is for the launcher is under `accelerate_config` and by its own names, as text; `env` is read back from the
    environment.
    """
    recipe = recipe_of(name, flags)
    config, said = recipe.accelerate_config, {**recipe.written, **recipe.launch}
    runs = {stage.name: stage.parse({}) for stage in plan(recipe)} if recipe.in_stages else {"": recipe.parse()}
    env = {name: os.environ[name] for name in recipe.written.get("env") or {}}
    launching = launch_keys_of(KeyParser(recipe.method).names) if config is not None else set()
    others = {"accelerate_config": config, "env": env, **{key: str(said[key]) for key in launching if key in said}}
    return {name: {**_plain(run), **others} for name, run in runs.items()}


def own_keys_of(method: str) -> list[str]:
    """The keys of a method that mmkd itself brings, sorted; transformers, TRL and accelerate bring the others."""
    declared = {
        name
        for part in KeyParser(method).types
        for kind in part.__mro__
        if kind.__module__.startswith("mmkd.")
        for name in kind.__annotations__
    }
    return sorted(declared.intersection(KeyParser(method).names))


def _plain(run: Run) -> dict[str, Any]:
    parts = (run.arguments, run.training, run.student, run.cache)
    found = {name: value for part in parts for name, value in vars(part).items()}
    known = KeyParser(run.arguments.method).names
    return {name: value.value if isinstance(value, Enum) else value for name, value in found.items() if name in known}
