"""Several teachers: mixed by weights on every token, or each asked about its own rows."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Bool
from torch import Tensor

from mmkd.errors import UserError
from mmkd.models.sharded_weights import is_sharded

from .base import Teacher
from .cached import BATCH_KEY, CachedTeacher, answers_of, hashed_images
from .local import LocalTeacher
from .server import IMAGE_INPUTS
from .signals import MixedSignal, RoutedSignal

_ROUTE, _ANSWERS = "route", "answers"


class SeveralTeachers(Teacher[MixedSignal | RoutedSignal]):
    """Teachers by name, each a Hub id, a folder, a model or a `Teacher` of its own kind.

    Args:
        teachers: name -> teacher. The name stands in the logs (`kl_NAME`) and, with `column`, in the rows.
        weights: name -> share of the loss on every token, in any unit; by default equal shares.
        column: the rows' column that names the one teacher of each row, instead of weights.

    Raises UserError for fewer than two teachers, for weights that are not positive or of other names, and where
    weights and column are both given.
    """

    signal_type = MixedSignal

    def __init__(
        self,
        teachers: Mapping[str, Any],
        weights: Mapping[str, float] | None = None,
        column: str | None = None,
    ):
        if len(teachers) < 2:
            raise UserError(f"There are {len(teachers)} teachers; give two or more, or set `teacher` to the only one.")
        if column is not None and weights is not None:
            raise UserError(
                f"The column {column!r} gives each row to one teacher, which leaves nothing to weigh. Remove the "
                "weights, or the column to mix all teachers on every token."
            )
        weights = dict.fromkeys(teachers, 1.0) if weights is None else weights
        if weights.keys() != teachers.keys() or not all(0 < weight < float("inf") for weight in weights.values()):
            raise UserError(
                f"The weights are {dict(weights)} for the teachers {', '.join(teachers)}; give each of them a number "
                "above 0, and leave out a teacher that shall not count."
            )
        total = sum(weights.values())
        self.weights = {name: weights[name] / total for name in teachers}
        self.teachers, self.column = dict(teachers), column
        self._sharded = False

    @property
    def caches(self) -> dict[str, CachedTeacher]:
        """Those that answer from a disk."""
        return {name: one for name, one in self.teachers.items() if isinstance(one, CachedTeacher)}

    def prepare(self, accelerator: Accelerator) -> None:
        """Each takes its place."""
        for teacher in self.teachers.values():
            teacher.prepare(accelerator)
        self._sharded = is_sharded(accelerator)

    def ask(self, inputs: dict[str, Any], supervised: Bool[Tensor, "batch position"]) -> MixedSignal | RoutedSignal:
        """What all say about every token; with a column, what each says about the tokens of its rows."""
        kept: Mapping[str, Any] = inputs.get(BATCH_KEY, {})
        answers = kept.get(_ANSWERS, {})
        inputs = {key: value for key, value in inputs.items() if key != BATCH_KEY}
        asked = {name: {**inputs, BATCH_KEY: answers[name]} if name in answers else inputs for name in self.teachers}
        if self.column is None:
            signals = {name: teacher.ask(asked[name], supervised) for name, teacher in self.teachers.items()}
            return MixedSignal(signals, self.weights)
        route = kept[_ROUTE]
        # Where rows lie end to end, each token has its route; position i predicts token i + 1.
        route = route[:, 1:] if route.shape[1] > 1 else route
        parts = {}
        for number, (name, teacher) in enumerate(self.teachers.items()):
            own = supervised & (route == number)
            parts[name] = (own[supervised], self._ask_one(teacher, asked[name], own))
        return RoutedSignal(parts)

    def _ask_one(self, teacher: Teacher, inputs: dict[str, Any], own: Tensor) -> Any:
        """One teacher about its tokens, of which there may be none, without the rows of the others."""
        rows = own.any(1)
        if not isinstance(teacher, LocalTeacher):
            return teacher.ask(inputs, own)
        if not rows.any():
            if not self._sharded:
                return teacher.nothing()
            # All ranks gather a sharded teacher together.
            rows[0] = True
        if rows.all() or any(name in inputs for name in IMAGE_INPUTS):
            return teacher.ask(inputs, own)
        alone = {key: _rows_of(one, rows) for key, one in inputs.items()}
        return teacher.ask(alone, own[rows])


class TeachersCollator:
    """A data collator that adds what several teachers need of a batch: whom each row asks, and what caches hold.

    Raises UserError for a row that names none of the teachers.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], Any], several: SeveralTeachers):
        self.collator, self.caches = collator, several.caches
        self.column, self.names = several.column, list(several.teachers)

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        # Before the collator, which may replace the images of its examples.
        images = hashed_images(examples) if self.caches else []
        batch = self.collator(examples)
        asked: Sequence[Mapping[str, CachedTeacher]] = [self.caches] * len(examples)
        kept: dict[str, Any] = {}
        if self.column is not None:
            names = [self._name_of(example) for example in examples]
            asked = [{name: self.caches[name]} if name in self.caches else {} for name in names]
            kept[_ROUTE] = self._route(batch, examples, names)
        if self.caches:
            found = answers_of(batch, images, asked)
            kept[_ANSWERS] = {name: cache.tensors(found.get(name, [])) for name, cache in self.caches.items()}
        return {**batch, BATCH_KEY: kept}

    def _name_of(self, example: Mapping[str, Any]) -> str:
        assert self.column is not None
        name = example.get(self.column)
        if name not in self.names:
            raise UserError(
                f"A row's {self.column} is {name!r}, which is none of the teachers ({', '.join(self.names)}). Name a "
                "teacher in every row, or leave such rows out of the data."
            )
        return str(name)

    def _route(self, batch: Mapping[str, Any], examples: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Tensor:
        """The number of the teacher of each row; of each token, in one row, where the rows lie end to end."""
        numbers = torch.tensor([self.names.index(name) for name in names])
        if len(batch["input_ids"]) == len(examples):
            return numbers[:, None]
        route = numbers.repeat_interleave(torch.tensor([len(example["input_ids"]) for example in examples]))
        # Padding to a multiple, after the last of them, is nobody's.
        return torch.nn.functional.pad(route, (0, batch["input_ids"].shape[1] - len(route)), value=-1)[None]


def parts_of(teacher: Any) -> list[Any]:
    """Each of several teachers, or the only one."""
    return list(teacher.teachers.values()) if isinstance(teacher, SeveralTeachers) else [teacher]


def _rows_of(value: Any, rows: Bool[Tensor, "batch"]) -> Any:
    return value[rows] if isinstance(value, Tensor) and len(value) == len(rows) else value
