"""`mmkd recipes`: list, show and copy what is shipped."""

import sys
from argparse import ArgumentParser, Namespace

from mmkd.shipped import copy_recipe, find_any

from .command import Command, CommandGroup


def add_list_flags(parser: ArgumentParser) -> None:
    """Of `mmkd recipes ls`."""
    parser.add_argument("words", nargs="*", metavar="WORD", help="only those that have all of these words: vqa CPU")


def show_all(options: Namespace) -> int:
    """Prints what ships, what each is for, and what it takes. Raises UserError when nothing has the words."""
    from rich.console import Console

    from mmkd.scaffold.recipe_list import entries_with, lines_of, print_blocks

    entries = entries_with(options.words)
    if sys.stdout.isatty():
        print_blocks(entries, Console(highlight=False))
    else:
        print(*lines_of(entries), sep="\n")
    return 0


def add_show_flags(parser: ArgumentParser) -> None:
    """Of `mmkd recipes show`."""
    parser.add_argument("name", help="such as kd/quickstart, or gsm8k for the data recipe of that name")


def show(options: Namespace) -> int:
    """Prints a recipe."""
    print(find_any(options.name).read_text(encoding="utf-8"), end="")
    return 0


def add_copy_flags(parser: ArgumentParser) -> None:
    """Of `mmkd recipes cp`."""
    add_show_flags(parser)
    parser.add_argument("destination", nargs="?", default=".", help="a file or a folder (default: this folder)")


def copy(options: Namespace) -> int:
    """Copies a recipe and prints where to."""
    print(copy_recipe(find_any(options.name), options.destination))
    return 0


COMMAND = CommandGroup(
    "recipes",
    "list, show or copy the recipes, data recipes and evaluations that ship",
    (
        Command("ls", "list them, with what each is for and the GPU it needs", show_all, add_list_flags),
        Command("show", "print one", show, add_show_flags),
        Command("cp", "copy one to edit", copy, add_copy_flags),
    ),
)
