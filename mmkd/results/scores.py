"""The main score of a task's result."""

from collections.abc import Mapping
from typing import Any

from mmkd.errors import UserError


def scores_of(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The scores of a task's entry: one score, or one per task for a group without a mean.

    A score is `{"task", "metric", "value", "stderr", "higher_is_better", "items", "of_items"}`; `of_items` is the
    total number of items of the task. An entry may name several metrics. Raises UserError for a metric that the task
    does not have.
    """
    task, metrics = entry["task"], entry["metric"]
    metrics = metrics if isinstance(metrics, list) else [metrics]
    everything = {**entry["results"], **entry["groups"]}
    if task in everything and (numbers := _numbers(everything[task])):
        return [_score(entry, task, numbers, metric) for metric in metrics]
    leaves = {name: _numbers(result) for name, result in entry["results"].items()}
    return [_score(entry, name, numbers, metric) for name, numbers in leaves.items() if numbers for metric in metrics]


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """`acc,none` -> value, without the standard errors."""
    return {
        name: value
        for name, value in result.items()
        if "," in name and "_stderr," not in name and isinstance(value, int | float)
    }


def _score(entry: Mapping[str, Any], task: str, numbers: dict[str, float], metric: str | None) -> dict[str, Any]:
    names = [name for name in numbers if metric is None or name == metric or name.partition(",")[0] == metric]
    if not names:
        raise UserError(f"Task {task} has no metric {metric!r}; it has {', '.join(numbers)}. Correct the suite.")
    name, _, chosen = names[0].partition(",")
    result = {**entry["results"], **entry["groups"]}[task]
    stderr = result.get(f"{name}_stderr,{chosen}")
    counts = entry["n_samples"].get(task) or {}
    return {
        "task": task,
        "metric": names[0],
        "value": numbers[names[0]],
        "stderr": stderr if isinstance(stderr, int | float) else None,
        "higher_is_better": (entry["higher_is_better"].get(task) or {}).get(name, True),
        "items": counts.get("effective"),
        "of_items": counts.get("original"),
    }


def items_of(score: Mapping[str, Any]) -> str:
    """The number of items of a score, as text."""
    if score["items"] is None:
        return ""
    return f"{score['items']:,}" + (f" of {score['of_items']:,}" if is_partial(score) else "")


def is_partial(score: Mapping[str, Any]) -> bool:
    """Whether a score covers only some of the task's items, as with --limit."""
    return score["items"] is not None and score["of_items"] not in (None, score["items"])
