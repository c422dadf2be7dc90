"""Which recipes can be compared, by what."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmkd.errors import UserError
from mmkd.recipe.recipe import Recipe
from mmkd.training.comparison import Comparison
from mmkd.training.method import METHODS

from .baselines import distils, label, methods_of, trains_several_times

if TYPE_CHECKING:
    from .compare import Asked


def check_recipe(recipe: Recipe) -> None:
    """Raises UserError for a recipe whose students nothing here can measure."""
    # Of one in stages, the last one leaves the student that is asked.
    name = methods_of(recipe)[-1]
    method = METHODS[name]
    if method.predicts != "tokens" and (method.comparison.measure is None or recipe.in_stages):
        raise UserError(
            f"{recipe.name} predicts {method.predicts} and no tokens, and method {name} "
            + ("cannot be compared in stages." if recipe.in_stages else "does not say how its students are measured.")
            + " Train it, and compare what its runs report.",
            because="not built",
        )


def check_together(recipes: Sequence[Recipe], asked: "Asked", method: Comparison) -> None:
    """Raises UserError for recipes whose students have no measure in common, and for what does not fit them."""
    own = {METHODS[methods_of(recipe)[-1]].predicts for recipe in recipes}
    if len(own) > 1:
        raise UserError(
            f"The recipes predict {' and '.join(sorted(own))}, which no number compares. Compare those of one kind.",
            because="meaning",
        )
    if method.measure is not None and asked.test is not None:
        raise UserError(
            f"--test is a file of questions to models that write, and these students predict {own.pop()}. They are "
            "measured on the test split or the held-out rows of their data recipe: name others there, under splits.",
            because="meaning",
        )
    if method.measure is not None and asked.tasks:
        raise UserError(
            f"Benchmarks ask models that write, and these students predict {own.pop()}.", because="meaning"
        )
    if asked.judge is not None and any(map(trains_several_times, recipes)):
        raise UserError(
            "--judge evaluates students of recipes with one training; those of stages or rounds are asked questions. "
            "Leave --judge out.",
            because="not built",
        )
    for name in asked.controls:
        if name not in method.controls:
            known = ", ".join(method.controls) or "none"
            raise UserError(f"There is no control {name!r} of {label(recipes[0])}; there are: {known}.")
    if asked.controls and not any(map(distils, recipes)):
        raise UserError("No recipe distils, so there is nothing to control.", because="meaning")


def check_reading(recipes: Sequence[Recipe]) -> None:
    """Raises UserError for recipes that read the held-out rows as different tokens."""
    readings = [(recipe.name, _reading(recipe)) for recipe in recipes]
    for name, other in readings[1:]:
        first, reading = readings[0]
        differing = [key for key in reading if reading[key] != other[key]]
        if differing:
            values = ", ".join(f"{key} {reading[key]} and {other[key]}" for key in differing)
            raise UserError(
                f"{first} and {name} read the held-out rows as different tokens ({values}), so that their numbers "
                f"do not compare. Have one of them judge all students: --judge {first}.",
                because="meaning",
            )


def _reading(recipe: Recipe) -> dict[str, Any]:
    run = recipe.parse()
    args = run.training
    packed = args.packing if args.eval_packing is None else args.eval_packing
    facts = {"data": run.arguments.data, "max_eval_rows": run.arguments.max_eval_rows, "max_length": args.max_length}
    return facts | {"packing": packed, "packing_strategy": args.packing_strategy if packed else None}
