"""How the students of a method are compared: with what, by what numbers, and over which seeds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmkd.results.compared import ComparedModel, Metric

# The values that these take are of parts above this one: a `Recipe` and a `Run` are of `mmkd.recipe`.
KeysOf = Callable[[Any, Path], Mapping[str, Any]]
"""(recipe of the student, its folder once it is trained) -> keys of what it is compared with."""

MeasureRun = Callable[[Any, str, Path], ComparedModel]
"""(run, teacher or trained, folder) -> the model, trained where that is asked, and measured."""


@dataclass(frozen=True)
class Control:
    """Another training that shows what a part of a method is good for."""

    help: str
    candidates: Callable[[Any, Path], Sequence[Mapping[str, Any]]]
    """As `KeysOf`; several candidates are all trained, and one is chosen per seed by validation rows."""
    usual: int = 0
    """The candidate for a metric that nothing is chosen for."""


@dataclass(frozen=True)
class Comparison:
    """What `mmkd compare` trains beside a method's students, and how it measures them; by default as a token loss."""

    baseline_method: str | None = "sft"
    """The method of the baseline, which keeps the keys that it knows; None is the method itself, with all keys."""

    baseline: KeysOf = lambda recipe, folder: {}
    """Keys of the baseline that are not those of the student."""

    baseline_name: str | None = None
    """In tables; by default the name of its recipe."""

    seeds: tuple[str, ...] = ("seed",)
    """The keys that a seed sets."""

    controls: Mapping[str, Control] = field(default_factory=dict)

    repeats: Callable[[Any], int] = lambda run: 0
    """How many trainings like the first a run has after it."""

    items: str = "tokens"
    """What students learn, and a teacher is asked about, in tables."""

    metrics: Mapping[str, Metric] = field(default_factory=dict)
    """Of what `measure` says, the first one first."""

    measure: MeasureRun | None = None
    """Set where students do not predict tokens."""

    timed: bool = False
    """Whether `measure` tells the `step_hours` of a training, which `--equal time` divides."""

    along: Callable[[Path], Mapping[str, Path]] | None = None
    """A student's folder -> the students on its way, by name, which are measured too."""

    teacher_tokens: Callable[[Path], int] | None = None
    """A student's folder -> tokens that the teacher has generated for it."""

    plot: Callable[[Mapping[str, Sequence[Path]], Path], Path | None] | None = None
    """(folders of each row's seeds, where to write) -> a picture, None where there is nothing to draw."""
