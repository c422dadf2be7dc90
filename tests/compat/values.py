"""The one place where tests of what 0.1 left behind reach into mmkd: what a recipe and flags mean, as plain values."""

import os
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from mmkd.recipe.arguments import Run
from mmkd.recipe.launch_flags import alone, launch_keys_of, split
from mmkd.recipe.run import given_flags, method_of, parse_run, parser_of, read_recipe
from mmkd.recipe.stages import plan


def values_of(recipe: str, flags: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The value of every key, by stage; of a recipe without stages under the name "".

    What is for the launcher is under `accelerate_config` and by its own names, as text; `env` is read back from the
    environment.
    """
    own, config, ignored = alone(recipe, flags)
    keys = read_recipe(Path(recipe))
    if "stages" in keys:
        stages, rest = plan(Path(recipe), own)
        runs = {stage.name: stage.parse(rest, ignored, {}) for stage in stages}
    else:
        runs = {"": parse_run(recipe, own, ignored)}
    env = {name: os.environ[name] for name in keys.get("env") or {}}
    launching = launch_keys_of(method_of(keys, own)) if config is not None else []
    said = {**keys, **given_flags(split(flags, launching)[0])}
    others = {"accelerate_config": config, "env": env, **{key: str(said[key]) for key in launching if key in said}}
    return {name: {**_plain(run), **others} for name, run in runs.items()}


def own_keys_of(method: str) -> list[str]:
    """The keys of a method that mmkd itself brings, sorted; transformers, TRL and accelerate bring the others."""
    declared = {
        name
        for part in parser_of(method).types
        for kind in part.__mro__
        if kind.__module__.startswith("mmkd.")
        for name in kind.__annotations__
    }
    return sorted(declared.intersection(parser_of(method).names))


def _plain(run: Run) -> dict[str, Any]:
    parts = (run.arguments, run.training, run.student, run.cache)
    found = {name: value for part in parts for name, value in vars(part).items()}
    known = parser_of(run.arguments.method).names
    return {name: value.value if isinstance(value, Enum) else value for name, value in found.items() if name in known}
