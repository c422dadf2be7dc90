"""Students that train equally long, instead of equally many steps."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mmkd.errors import UserError
from mmkd.recipe.recipe import Recipe
from mmkd.recipe.stages import plan
from mmkd.results.compared import ComparedModel
from mmkd.training.comparison import Comparison
from mmkd.training.method import METHODS

from .baselines import with_keys


def check_equal_time(recipes: Sequence[Recipe], method: Comparison) -> None:
    """Raises UserError for recipes whose steps cannot be counted out by time."""
    untimed = method.measure is not None and not method.timed
    if untimed or any(METHODS[recipe.method].drive is not None for recipe in recipes):
        raise UserError(
            "--equal time is for recipes of one training or of stages, not for classes or rounds. Measure the time of "
            "a training, and set max_steps.",
            because="not built",
        )


def step_factors(
    recipes: Mapping[str, Sequence[Recipe]], train: Callable[[str, Recipe], ComparedModel]
) -> dict[str, list[float]]:
    """By how much each training has to be longer to take as much time as the one that takes most.

    The time of a training is that of its steps, by processors and not by the clock, without loading and measuring.
    `train` gives the measurements of a recipe by its name. Raises UserError where an earlier version measured it.
    """
    hours = {name: [_hours(name, train(name, recipe)) for recipe in own] for name, own in recipes.items()}
    longest = max(value for own in hours.values() for value in own)
    return {name: [longest / value for value in own] for name, own in hours.items()}


def longer(recipe: Recipe, factor: float, path: Path) -> Recipe:
    """The recipe with so many times as many steps, of one in stages in each stage, written to the path."""
    if factor == 1:
        return recipe
    if not recipe.in_stages:
        return with_keys(recipe, path, _times(recipe, factor))
    for stage in {stage.name: stage for stage in plan(recipe)}.values():
        recipe = with_keys(recipe, path, _times(stage.recipe, factor), (stage.name,))
    return recipe


def _times(recipe: Recipe, factor: float) -> dict[str, int | float]:
    training = recipe.parse().training
    if training.max_steps > 0:
        return {"max_steps": max(1, round(training.max_steps * factor))}
    return {"num_train_epochs": training.num_train_epochs * factor}


def _hours(name: str, model: ComparedModel) -> float:
    hours = (model.cost or {}).get("step_hours")
    if not hours:
        raise UserError(
            f"{name} was trained by a version that did not measure its steps. Name another --output, or delete "
            f"{model.folder}."
        )
    return hours
