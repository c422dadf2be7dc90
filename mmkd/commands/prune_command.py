"""`mmkd prune`: a smaller student cut out of a model, before any training."""

from argparse import ArgumentParser, Namespace

from .command import Command


def add_flags(parser: ArgumentParser) -> None:
    """The model or recipe, and where the student goes."""
    add = parser.add_argument
    add("recipe", metavar="MODEL_OR_RECIPE", help="Hub id or folder of a model, or a recipe with student_init: prune")
    add("--output", required=True, help="the folder to write")


def run(options: Namespace) -> int:
    """Writes the student's folder."""
    from rich.console import Console

    from mmkd.recipe.prune_folder import prune_folder, prune_recipe

    prune_folder(prune_recipe(options.recipe, options.flags), options.output, Console())
    return 0


COMMAND = Command(
    "prune",
    "cut a smaller student out of a model, by what matters",
    run,
    add_flags,
    "Writes a smaller model with a report: what went and why, parameters, and perplexity on held-out rows before any "
    "training. Sizes and how importance is measured are flags: --student_hidden_size 512, --target_params 0.5B, "
    "--prune_importance activations. With a model, --data names the rows. With a recipe, every key of it is a flag.",
    recipe="recipe",
)
