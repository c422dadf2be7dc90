"""What a method is, and METHODS: the one table of methods."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from mmkd.errors import UserError

from .comparison import Comparison

Train = Callable[[Any], int]
"""Trains a recipe; the exit status."""

# The values that these take and give are of parts above this one: a `Run` and a `Recipe` are of `mmkd.recipe`, a
# `Finding`, a `StageRun` and a `Device` are ones of `mmkd.preflight`.
Build = Callable[[Any], Any]
"""Run -> the trainer, with student, teacher and data loaded and checked. Raises UserError for what cannot be."""

Drive = Callable[[Any, Train], int]
"""(run, how to train a recipe) -> the exit status of all trainings together."""

DryRun = Callable[[Any, Console], Any]
"""Prints what a run would do -> its trainer, whose student the next stage begins with; None where it has none."""

Check = Callable[[Any], None]
"""Raises UserError for a run that training would refuse, before the stages that come first are trained."""

Examine = Callable[[Any, bool], list[Any]]
"""(run, whether its weights are spread over several devices) -> the findings of `mmkd doctor`."""

Forecast = Callable[[Any, Any, int, float | None, Console], int]
"""(stage's run, device, devices, price of an hour) -> 0 when the run fits, 1 when not; prints the plan."""

StandIn = Callable[[Any, Path], None]
"""(run, folder): writes what the student of a run will leave for the next stage there, without its weights."""

BuildCache = Callable[[Any], Path]
"""Writes what the teacher of a run says of all rows, unless it is there -> the folder."""

DataFacts = Callable[[str], dict[str, Any]]
"""Name of a data recipe -> what the record of a run says of it: name, licence, homepage and source at least."""


@dataclass(frozen=True)
class Method:
    """A method: its trainer, and where it differs from a loss over tokens, what stands in that one's place.

    Every function that is None is that of a token loss, which `mmkd.recipe` and `mmkd.preflight` hold.
    """

    trainer: type[Any]
    """Its `method` is the method's name, its `config_class` has the keys that a recipe may set."""

    predicts: Literal["tokens", "classes", "features", "embeddings"] = "tokens"
    """What its students predict. Commands that compare or keep distributions over tokens take such recipes only."""

    leaves: Literal["student", "student_vision_tower"] = "student"
    """The key of the next stage that what it trains goes to: the whole student, or the tower to make one of."""

    leaves_whole_student: bool = False
    """Whether output_dir holds a whole student even where an adapter was trained."""

    build: Build | None = None
    drive: Drive | None = None
    """Set where a run consists of several trainings, which it starts one after another."""

    answer_tokens: Callable[[Any], int] | None = None
    """Set where the teacher writes the answers, so that rows may be prompts only: the settings of training -> tokens
    of the longest answer."""

    dry_run: DryRun | None = None
    check: Check | None = None
    examine: Examine | None = None
    plan: Forecast | None = None
    data_facts: DataFacts | None = None
    stand_in: StandIn | None = None
    build_cache: BuildCache | None = None

    inherits: bool = False
    """Whether a student may begin with a part of its teacher's weights (student_init: inherit)."""

    unused: Mapping[str, str] = field(default_factory=dict)
    """Keys that every recipe may set and one of this method has no use for -> why. `--help_keys` hides them."""

    comparison: Comparison = field(default_factory=Comparison)
    """What `mmkd compare` trains beside its students, and how it measures them."""

    def __post_init__(self) -> None:
        own = ("build", "dry_run", "check", "examine", "plan", "data_facts")
        missing = [name for name in own if getattr(self, name) is None]
        if self.predicts != "tokens" and missing:
            raise TypeError(
                f"Method {self.name} predicts {self.predicts}, which nothing of a token loss is of use for: give it "
                f"{', '.join(missing)}."
            )

    @property
    def name(self) -> str:
        """What a recipe says under `method`."""
        return self.trainer.method

    @property
    def config(self) -> type[Any]:
        """The dataclass of its keys."""
        return self.trainer.config_class

    @property
    def accepts(self) -> tuple[type, ...]:
        """The signals that it can learn from."""
        return self.trainer.accepts

    @property
    def needs_teacher(self) -> bool:
        """Whether its loss is nothing without a teacher's signal."""
        return self.trainer.needs_teacher

    @property
    def takes_several(self) -> bool:
        """Whether several teachers may teach at a time."""
        return self.trainer.takes_several

    @property
    def teacher_keys(self) -> tuple[str, ...]:
        """Of its settings, those that each of several teachers may have for itself."""
        return self.trainer.teacher_keys

    @property
    def one_vocabulary(self) -> bool:
        """Whether it compares distributions over tokens that student and teacher share."""
        return self.trainer.one_vocabulary


class Methods(Mapping[str, Method]):
    """Name in a recipe -> method, imported when it is asked for: those of mmkd, then those of installed packages.

    A package adds a method through an entry point of the group `mmkd.methods`. Raises UserError where two methods have
    one name, and for a package whose method cannot be imported.
    """

    GROUP = "mmkd.methods"

    def __init__(self, places: Mapping[str, str]) -> None:
        self._own = dict(places)

    @cached_property
    def _added(self) -> dict[str, EntryPoint]:
        added: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.GROUP):
            if point.name in self._own or point.name in added:
                other = "mmkd itself" if point.name in self._own else _package(added[point.name])
                raise UserError(
                    f"The package {_package(point)} adds a method {point.name!r}, and so does {other}. Uninstall one "
                    "of them, or ask its author for another name."
                )
            added[point.name] = point
        return added

    def __getitem__(self, name: str) -> Method:
        if name not in self._own:
            return _load(self._added[name])
        module, _, attribute = self._own[name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from self._added

    def __len__(self) -> int:
        return len(self._own) + len(self._added)


def _load(point: EntryPoint) -> Method:
    try:
        method = point.load()
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"The method {point.name!r} of the package {_package(point)} cannot be imported ({error}). Update that "
            "package, or uninstall it."
        ) from error
    if not isinstance(method, Method) or method.name != point.name:
        raise UserError(
            f"The package {_package(point)} names {point.value} as method {point.name!r}, which is no `Method` of "
            "that name. Update that package, or uninstall it."
        )
    return method


def _package(point: EntryPoint) -> str:
    return point.value if point.dist is None else point.dist.name


METHODS = Methods(
    {
        "sft": "mmkd.methods.sft:METHOD",
        "kd": "mmkd.methods.kd:METHOD",
        "taid": "mmkd.methods.taid:METHOD",
        "alm": "mmkd.methods.alm:METHOD",
        "llava_kd": "mmkd.methods.llava_kd:METHOD",
        "comd": "mmkd.methods.comd.comd_method:METHOD",
        "dho": "mmkd.methods.dho.dho_method:METHOD",
        "tower_kd": "mmkd.methods.tower_kd.tower_kd_method:METHOD",
        "clip_kd": "mmkd.methods.clip_kd.clip_kd_method:METHOD",
        "trans_encoder": "mmkd.methods.trans_encoder.trans_encoder_method:METHOD",
    }
)


def learns_from(signal: type) -> str:
    """The first method that such a signal of a teacher is enough for."""
    return next(name for name, method in METHODS.items() if method.needs_teacher and signal in method.accepts)


BASELINE_METHOD = "sft"
"""The method that distils nothing, which students of the others are compared with."""
