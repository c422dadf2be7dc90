"""The one reader of flags: what a command line says after a recipe, as keys of that recipe."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmkd.errors import UserError

from .flag_words import Flag, split_flags
from .key_hints import hint_at
from .key_parser import KeyParser, parser_of
from .launch_keys import launch_keys_of, launch_options
from .recipe import STAGE_KEYS, Recipe

CONFIG = "accelerate_config"


def recipe_of(name_or_path: str | Path, flags: Sequence[str] = ()) -> Recipe:
    """A recipe with the flags after it, which win over its keys.

    `--a-b 1`, `--a_b 1` and `--a_b=1` set the key a_b; the last of several wins; `--a` is true and `--no_a` false;
    lists are several words or JSON, mappings are JSON; `--stages A B` sets the schedule. With an accelerate_config,
    keys that `accelerate launch` knows and the recipe does not are read too. Raises UserError for a flag that nobody
    knows, and for words that belong to none.
    """
    recipe, read = Recipe.read(name_or_path), split_flags(flags)
    first = {flag.name: flag.values[0] for flag in read if flag.name in ("method", CONFIG) and flag.values}
    launch: dict[str, Any] = {CONFIG: first[CONFIG]} if CONFIG in first else {}
    recipe = replace(recipe, launch=launch, command=(*recipe.command, *flags))
    method = recipe.with_(method=first["method"]).method if "method" in first else recipe.method
    parser = parser_of(method)
    launch_keys = set() if recipe.accelerate_config is None else launch_keys_of(parser.names)
    overrides: dict[str, Any] = {}
    spelled: dict[str, list[str]] = {}
    for flag in read:
        name = flag.name
        if name in parser.options:
            least, most = parser.arity(name)
            words = _words(flag, least, most, method, parser)
            key = parser.options[name]
            overrides[key] = parser.value(name, words)
            # One spelling of what is true or false; the others as they were typed.
            spelled.pop(key, None)
            if least:
                spelled[key] = words
            elif overrides[key] is True:
                spelled[key] = []
        elif name in STAGE_KEYS:
            if not recipe.in_stages:
                raise UserError(
                    f"{recipe.name} has no stages, so {flag.typed} has nothing to choose from.", because="meaning"
                )
            overrides["schedule"] = _words(flag, 0, None, method, parser)
        elif name == CONFIG or name in launch_keys:
            takes = 0 if name != CONFIG and launch_options()[name].nargs == 0 else 1
            launch[name] = (_words(flag, takes, takes, method, parser) or [True])[0]
        else:
            word = flag.typed or flag.values[0]
            advice = "." if flag.typed else "; write --key value."
            name = word.removeprefix("--").partition("=")[0]
            raise UserError(f"{word} is no flag of method {method}{advice}{hint_at(name, parser.names)}")
    return replace(recipe, overrides=overrides, spelled=spelled)


def _words(flag: Flag, least: int, most: int | None, method: str, parser: KeyParser) -> list[str]:
    """The values of a flag. Raises UserError for fewer or more than it takes."""
    if len(flag.values) < least:
        raise UserError(f"{flag.typed} stands there without a value: write {flag.typed} VALUE.")
    most = 1 if flag.joined else most
    if most is not None and len(flag.values) > most:
        word = flag.values[most]
        if flag.typed == "--data":
            raise UserError(
                f"--data takes one source of rows, and {word} is another. Put a glob in quotes; to mix sources, write "
                "a data recipe with `mixture:`."
            )
        hint = hint_at(word.partition("=")[0], parser.names)
        raise UserError(f"{word} is no flag of method {method}; write --key value.{hint}")
    return flag.values
