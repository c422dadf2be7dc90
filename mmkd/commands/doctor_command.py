"""`mmkd doctor`: would a recipe be a sound run?"""

from argparse import ArgumentParser, Namespace

from .command import Command, say_recipe


def add_flags(parser: ArgumentParser) -> None:
    """The recipe alone."""
    parser.add_argument("recipe", help="path of a YAML file, or name of a shipped recipe")


def run(options: Namespace) -> int:
    """Examines a recipe and prints what is wrong with it."""
    say_recipe(options)
    from rich.console import Console

    from mmkd.preflight.doctor import doctor
    from mmkd.recipe.flags import recipe_of

    return doctor(recipe_of(options.recipe, options.flags), Console())


COMMAND = Command(
    "doctor", "say whether a recipe would be a sound run, before anything is spent", run, add_flags, recipe="recipe"
)
