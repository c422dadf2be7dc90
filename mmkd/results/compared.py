"""What a comparison knows of a model: its numbers, the items that they are means of, and what it cost."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Metric:
    """A number by which models are compared."""

    title: str
    report: str = ""
    """The report whose totals and counts it is a function of: then a difference has an interval."""
    transform: Callable[[Any], Any] = lambda mean: mean
    higher_is_better: bool = False
    of_the_model: bool = False
    """Whether it says how good a model is, and not how near its teacher: there is then a retention, and a verdict."""
    chosen_by: str | None = None
    """The metric by which one of a control's candidates is chosen for this one; None: the usual candidate."""


@dataclass(frozen=True)
class ComparedModel:
    """A model of a comparison: the teacher, the student before training, or one training with one seed."""

    stage: str
    """teacher, untrained or trained."""
    folder: str
    """Where it lies: a folder, or the teacher's name."""
    parameters: int
    metrics: dict[str, float]
    items: dict[str, list[tuple[float, float]]]
    """Report -> (total, count) of every held-out item, such as a batch of rows or a question."""
    tokens: int = 0
    """Supervised tokens it was trained on."""
    cost: dict[str, Any] | None = None
    cache: dict[str, Any] | None = None
    weights: str | None = None
    """Of what was trained, as `mmkd push` compares them with those it finds."""
    measured_on: str = ""
    """The rows of its own measure, in words; held-out rows of the recipe's data where there is none."""
    along: dict[str, float] = field(default_factory=dict)
    """The first measure of students on the way, by their names, such as "round 0"."""
