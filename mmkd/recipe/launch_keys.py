"""What `accelerate launch` reads of a recipe."""

import argparse
import functools
from collections.abc import Collection, Mapping
from typing import Any

from mmkd.seams.accelerate_seam import launch_actions

# Of help and -m mmkd says itself; `env` is a mapping in a recipe, which its own process sets.
_NOT_HERE = {"help", "module", "env"}


@functools.cache
def launch_options() -> Mapping[str, argparse.Action]:
    """The options of `accelerate launch`, by the key they are in a recipe."""
    return {action.dest: action for action in launch_actions() if action.dest not in _NOT_HERE}


def launch_keys_of(ours: Collection[str]) -> set[str]:
    """What `accelerate launch` reads and a recipe with these keys does not."""
    return launch_options().keys() - set(ours)


def launch_words(keys: Mapping[str, Any]) -> list[str]:
    """Keys as `accelerate launch` reads them on its command line."""
    words: list[str] = []
    for name, value in keys.items():
        action = launch_options()[name]
        option = next(option for option in action.option_strings if option.startswith("--"))
        if action.nargs != 0:
            words += [option, str(value)]
        elif value:
            words += [option]
    return words
