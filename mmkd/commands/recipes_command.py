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


def add_schema_flags(parser: ArgumentParser) -> None:
    """Of `mmkd recipes schema`."""
    parser.add_argument(
        "kind",
        nargs="?",
        default="recipe",
        choices=("recipe", "data_recipe", "class_data_recipe"),
        help="of what: a recipe (default), or the data recipe of rows to learn from or of classes",
    )


def print_schema(options: Namespace) -> int:
    """Prints a JSON Schema, that of recipes with all installed methods."""
    import json

    from mmkd.data.data_schema import class_data_recipe_schema, data_recipe_schema
    from mmkd.recipe.recipe_schema import recipe_schema
    from mmkd.training.method import METHODS

    if options.kind == "recipe":
        schema = recipe_schema(list(METHODS))
    else:
        schema = data_recipe_schema() if options.kind == "data_recipe" else class_data_recipe_schema()
    print(json.dumps(schema, indent=1))
    return 0


COMMAND = CommandGroup(
    "recipes",
    "list, show or copy the recipes, data recipes and evaluations that ship",
    (
        Command("ls", "list them, with what each is for and the GPU it needs", show_all, add_list_flags),
        Command("show", "print one", show, add_show_flags),
        Command("cp", "copy one to edit", copy, add_copy_flags),
        Command(
            "schema",
            "print the JSON Schema of recipes or data recipes, by which editors complete and check keys",
            print_schema,
            add_schema_flags,
            "Prints a JSON Schema (draft 2020-12). The recipes that ship, and those that mmkd copies and writes, name "
            "theirs in the first line. Methods of other packages are only in what this prints: save it, and name the "
            "file in the first line of your recipe: # yaml-language-server: $schema=my_schema.json",
        ),
    ),
)
