"""`mmkd plan`: what a recipe needs on devices that are not here."""

from argparse import ArgumentParser, Namespace

from .command import Command, say_recipe


def add_flags(parser: ArgumentParser) -> None:
    """The recipe, and the devices."""
    add = parser.add_argument
    add("recipe", help="path of a YAML file, or name of a shipped recipe")
    add("--gpus", type=int, default=1, help="number of devices (default: 1)")
    add("--memory", type=float, help="GiB of one device (default: that of --gpu)")
    add("--gpu", help="A100-80GB, H100, L4, ..., or here: this machine's device, its speed measured")
    add("--utilisation", type=float, help="share of the device's FLOPs that training reaches (default: 0.4)")
    add("--price", type=float, help="of a device for an hour")


def run(options: Namespace) -> int:
    """Prints the forecast."""
    say_recipe(options)
    from rich.console import Console

    from mmkd.preflight.hardware import choose_device
    from mmkd.preflight.plan import plan
    from mmkd.recipe.flags import recipe_of

    device = choose_device(options.gpu, options.memory, options.utilisation)
    return plan(recipe_of(options.recipe, options.flags), device, options.gpus, options.price, Console())


COMMAND = Command(
    "plan",
    "predict memory, time, cache and cost of a recipe on devices that are not here",
    run,
    add_flags,
    "Counts the FLOPs and bytes of a recipe's step without loading weights, and says whether it fits. Every key of "
    "the recipe is a flag.",
    recipe="recipe",
)
