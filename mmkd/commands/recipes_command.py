"""`mmkd recipes`: list, show and copy what is shipped."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from mmkd.shipped import KINDS, copy_recipe, find_recipe, list_recipes

from .command import Command, CommandGroup


def show_all(options: Namespace) -> int:
    """Prints the names of all shipped recipes."""
    for kind in KINDS:
        for name in list_recipes(kind):
            print(f"{kind}/{name}")
    return 0


def add_show_flags(parser: ArgumentParser) -> None:
    """Of `mmkd recipes show`."""
    parser.add_argument("name")


def show(options: Namespace) -> int:
    """Prints a recipe."""
    print(_find(options.name).read_text(encoding="utf-8"), end="")
    return 0


def add_copy_flags(parser: ArgumentParser) -> None:
    """Of `mmkd recipes cp`."""
    parser.add_argument("name")
    parser.add_argument("destination", nargs="?", default=".")


def copy(options: Namespace) -> int:
    """Copies a recipe and prints where to."""
    print(copy_recipe(_find(options.name), options.destination))
    return 0


def _find(name: str) -> Path:
    kind = next((kind for kind in KINDS if name.startswith(f"{kind}/")), "trainers")
    return find_recipe(name, kind)


COMMAND = CommandGroup(
    "recipes",
    "list, show or copy the shipped recipes",
    (
        Command("ls", "list them", show_all),
        Command("show", "print one", show, add_show_flags),
        Command("cp", "copy one to edit", copy, add_copy_flags),
    ),
)
