"""`mmkd train`, which is also `mmkd-train`."""

from argparse import ArgumentParser, Namespace

from .command import Command


def add_flags(parser: ArgumentParser) -> None:
    """Those that are no keys of the recipe."""
    parser.add_argument("recipe", help="path of a YAML file, or name of a shipped recipe (`mmkd recipes ls`)")
    parser.add_argument(
        "--accelerate_config", help="single_gpu, ddp, fsdp2, zero2, zero3 or the path of a config file"
    )
    parser.add_argument("--help_keys", action="store_true", help="list all keys and flags of the recipe's method")
    parser.add_argument(
        "--with_baseline", action="store_true", help="also train the SFT baseline and compare: see `mmkd compare`"
    )


def run(options: Namespace) -> int:
    """Trains, or says what can be set."""
    from mmkd.recipe.flags import recipe_of

    from . import train

    config = options.accelerate_config
    flags = options.flags if config is None else ["--accelerate_config", config, *options.flags]
    recipe = recipe_of(options.recipe, flags)
    if options.help_keys:
        return train.print_keys(recipe)
    if options.with_baseline:
        from .compare_command import with_baseline

        return with_baseline(recipe)
    return train.train(recipe)


COMMAND = Command(
    "train",
    "run a recipe",
    run,
    add_flags,
    "Runs a recipe: mmkd train RECIPE.yaml [--key value ...]. Every key of the recipe is a flag, and flags win. `mmkd "
    "train RECIPE --help_keys` lists the keys of its method.",
    recipe="recipe",
)
