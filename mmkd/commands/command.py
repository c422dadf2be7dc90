"""What a command is: its name, its flags, and what runs it."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from mmkd.errors import UserError
from mmkd.shipped import find_recipe


def no_flags(parser: ArgumentParser) -> None:
    """Adds nothing: for a command that is one word."""


def say_recipe(options: Namespace) -> None:
    """Says at once what a recipe describes, and refuses misspelt keys and flags, before anything heavy is imported."""
    from mmkd.recipe.first_look import first_look

    # Not among what the command prints, which may be read by a program.
    print(first_look(options.recipe, options.flags, files=False), file=sys.stderr, flush=True)


def add_trust(parser: ArgumentParser) -> None:
    """Adds the flag without which no code of a model runs, whatever a run's record says."""
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with a model")


@dataclass(frozen=True)
class Command:
    """A word after `mmkd`. Its module imports what is heavy inside `run`, so that `--help` does not wait for torch."""

    name: str
    help: str
    run: Callable[[Namespace], int]
    """Does it; returns the exit status. The words that its parser does not know are in `flags`."""
    add_flags: Callable[[ArgumentParser], None] = no_flags
    description: str | None = None
    recipe: str | None = None
    """Its argument that names a recipe, where flags that its parser does not know are keys of that recipe."""
    allow_abbrev: bool = True
    add_help: bool = True
    """Whether its --help is argparse's, and `add_flags` adds none of its own."""

    @property
    def of_parser(self) -> dict[str, Any]:
        """What its parser is made with; `add_flags` adds the rest."""
        return {"description": self.description, "allow_abbrev": self.allow_abbrev, "add_help": self.add_help}

    def check_flags(self, options: Namespace, words: Sequence[str]) -> None:
        """Raises UserError for a key before the recipe whose value was taken for the recipe.

        Only who reads the recipe knows how many values a key of it takes. What can stand there is a key that is true.
        """
        name = None if self.recipe is None else getattr(options, self.recipe)
        if name is None:
            return
        name = name if isinstance(name, str) else name[0]
        start = words.index(name)
        key = words[start - 1] if start else ""
        if key not in options.flags or "=" in key:
            return
        values = list(takewhile(lambda word: not word.startswith("--"), words[start:]))
        # A last word that found no place belongs to the key, and so do those before it.
        if values[-1] in options.flags or not is_recipe(name):
            raise UserError(
                f"{key} stands before the recipe, where its value cannot be told from a recipe's name. Put the recipe "
                f"first: RECIPE {key} {name}."
            )


@dataclass(frozen=True)
class CommandGroup:
    """A word after `mmkd` with commands of its own."""

    name: str
    help: str
    commands: tuple[Command, ...]


def is_recipe(name: str) -> bool:
    """Whether it is a file, or the name of a shipped recipe."""
    try:
        find_recipe(name)
    except UserError:
        return False
    return True
