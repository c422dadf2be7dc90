"""`mmkd train`, which is also `mmkd-train`."""

import os
from argparse import ArgumentParser, Namespace
from typing import Any

from .command import Command, is_recipe
from .quick_imports import quick_imports

LAUNCHED = "MMKD_LAUNCHED"
"""Set in the processes that an accelerate_config starts."""


def add_flags(parser: ArgumentParser) -> None:
    """Those that are no keys of the recipe."""
    parser.add_argument(
        "recipe", nargs="?", help="path of a YAML file, or name of a shipped recipe (`mmkd recipes ls`)"
    )
    parser.add_argument(
        "--accelerate_config", help="single_gpu, ddp, fsdp2, zero2, zero3 or the path of a config file"
    )
    parser.add_argument(
        "--help_keys",
        nargs="*",
        metavar="WORD",
        help="list the keys of the recipe's method and exit; without a recipe, those of all methods, or of the one "
        "that the first word names. Other words select the keys with these words in their name or description; all "
        "also lists keys that are of no use to the method",
    )
    parser.add_argument(
        "--with_baseline", action="store_true", help="also train the SFT baseline and compare: see `mmkd compare`"
    )


def run(options: Namespace) -> int:
    """Trains, or says what can be set."""
    if options.help_keys is not None:
        return _print_keys(options)
    if options.recipe is None:
        parser: ArgumentParser = options.parser
        parser.error("the following arguments are required: recipe")
    _look(options)
    with quick_imports():
        from . import train

    recipe = _recipe_of(options.recipe, options)
    if options.with_baseline:
        from .compare_command import with_baseline

        return with_baseline(recipe)
    return train.train(recipe)


def _look(options: Namespace) -> None:
    """Says what will be trained, before anything heavy is imported; of several processes one says so."""
    from mmkd.recipe.first_look import first_look

    launched = [] if options.accelerate_config is None else ["--accelerate_config", options.accelerate_config]
    line = first_look(options.recipe, [*launched, *options.flags])
    if LAUNCHED not in os.environ and os.environ.get("RANK", "0") == "0" and "--dry_run" not in options.flags:
        print(line, flush=True)


def _recipe_of(name: str, options: Namespace) -> Any:
    from mmkd.recipe.flags import recipe_of

    config = options.accelerate_config
    return recipe_of(name, options.flags if config is None else ["--accelerate_config", config, *options.flags])


def _print_keys(options: Namespace) -> int:
    """Lists the keys of a recipe's method, which may stand after --help_keys too, of one by name, or of all."""
    from mmkd.recipe import key_help
    from mmkd.training.method import METHODS

    name, words = options.recipe, options.help_keys
    if name is None and words and words[0] not in METHODS and is_recipe(words[0]):
        name, words = words[0], words[1:]
    if name is not None:
        return key_help.print_keys_of(_recipe_of(name, options), words)
    method = words[0] if words and words[0] in METHODS else None
    return key_help.print_keys(key_help.page(), method, words if method is None else words[1:])


COMMAND = Command(
    "train",
    "run a recipe",
    run,
    add_flags,
    "Runs a recipe: mmkd train RECIPE.yaml [--key value ...]. Every key of the recipe is a flag, and flags win. `mmkd "
    "train RECIPE --help_keys` lists the keys of its method, `--help_keys WORD` those about a word.",
    recipe="recipe",
)
