"""Several teachers: mixed by weights on every token, or each asked about its own rows."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

from accelerate import Accelerator
from jaxtyping import Bool
from torch import Tensor

from mmkd.data.teacher_view import TeacherView
from mmkd.errors import UserError
from mmkd.losses.fused import Targets
from mmkd.models.sharded_weights import is_sharded

from .batch import ONLY, Batch, View
from .cached import CachedTeacher, Seen, with_answers_of
from .local import ModelTeacher
from .routes import route_of, teacher_names
from .server import IMAGE_INPUTS
from .signals import MixedSignal, RoutedSignal
from .teacher import Teacher

Answer = TypeVar("Answer")


class SeveralTeachers(Teacher[MixedSignal[Any] | RoutedSignal[Any]]):
    """Teachers by name, each a Hub id, a folder, a model or a `Teacher` of its own kind.

    Args:
        teachers: name -> teacher. The name stands in the logs (`kl_NAME`) and, with `column`, in the rows.
        weights: name -> share of the loss on every token, in any unit; by default equal shares.
        column: the rows' column that names the one teacher of each row, instead of weights.
        views: name -> the `teacher_view` of a teacher that does not read what the settings' own says; None: what the
            student reads.

    Raises UserError for fewer than two teachers, for weights that are not positive or of other names, and where
    weights and column are both given.
    """

    signal_type = MixedSignal

    def __init__(
        self,
        teachers: Mapping[str, Any],
        weights: Mapping[str, float] | None = None,
        column: str | None = None,
        views: Mapping[str, TeacherView | Mapping[str, Any] | None] | None = None,
    ):
        if len(teachers) < 2:
            raise UserError(f"There are {len(teachers)} teachers; give two or more, or set `teacher` to the only one.")
        if column is not None and weights is not None:
            raise UserError(
                f"The column {column!r} gives each row to one teacher, which leaves nothing to weigh. Remove the "
                "weights, or the column to mix all teachers on every token.",
                because="meaning",
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
        self.views = {name: TeacherView.of(view) for name, view in (views or {}).items()}
        if unknown := [name for name in self.views if name not in teachers]:
            raise UserError(f"views names {unknown[0]!r}, which is none of the teachers {', '.join(teachers)}.")
        self._sharded = False

    def replaced_by(self, teachers: Mapping[str, Teacher]) -> Self:
        """The same with other teachers under the names, those that were loaded say."""
        several = copy(self)
        several.teachers = dict(teachers)
        return several

    @property
    def caches(self) -> dict[str, CachedTeacher]:
        """Those that answer from a disk."""
        return {name: teacher for name, teacher in self.teachers.items() if isinstance(teacher, CachedTeacher)}

    @property
    def served(self) -> bool:
        """Whether one of them is."""
        return any(teacher.served for teacher in self.teachers.values())

    def prepare(self, accelerator: Accelerator) -> None:
        """Each takes its place."""
        for teacher in self.teachers.values():
            teacher.prepare(accelerator)
        self._sharded = is_sharded(accelerator)

    def ask(
        self, inputs: View, supervised: Bool[Tensor, "batch position"]
    ) -> MixedSignal[Targets] | RoutedSignal[Targets]:
        """What all say about every token of a view that all read; with a column, each about the tokens of its rows."""
        labels = inputs.labels.clone()
        labels[:, 1:] = labels[:, 1:].masked_fill(~supervised, -100)
        batch = Batch(replace(inputs, labels=labels), labels.new_zeros(0))
        return self.about(batch, lambda teacher, name, view: teacher.ask(view, view.supervised))

    def about(
        self, batch: Batch, ask: Callable[[Teacher[Any], str, View], Answer]
    ) -> MixedSignal[Answer] | RoutedSignal[Answer]:
        """What `ask` (teacher, name, what it reads) gives for each; with a column, about the tokens of its rows."""
        views = {name: self.own_rows(name, theirs) for name, (_, theirs) in self.pairs(batch).items()}
        return self.together(batch, {name: ask(self.teachers[name], name, view) for name, view in views.items()})

    def together(self, batch: Batch, answers: Mapping[str, Answer]) -> MixedSignal[Answer] | RoutedSignal[Answer]:
        """What all say about a batch, of what each says where it teaches."""
        return MixedSignal(answers, self.weights) if self.column is None else RoutedSignal(answers, self._masks(batch))

    def student_views(self, batch: Batch) -> dict[str, View]:
        """What the student reads, with labels where each teacher teaches."""
        if self.column is None:
            return dict.fromkeys(self.teachers, batch.student)
        return {name: batch.student.learnt_from(mask) for name, mask in self._masks(batch).items()}

    def pairs(self, batch: Batch) -> dict[str, tuple[View, View]]:
        """What the student and each teacher read of a batch, with labels where this teacher teaches."""
        theirs = {name: batch.teacher_view(name) for name in self.teachers}
        if self.column is not None:
            for name, mask in self._masks(batch).items():
                read = theirs[name]
                theirs[name] = batch.in_sequences(read, mask) if name in batch.readings else read.learnt_from(mask)
        return {name: (view, theirs[name]) for name, view in self.student_views(batch).items()}

    def _masks(self, batch: Batch) -> dict[str, Bool[Tensor, "batch position"]]:
        route = batch.student.route
        assert route is not None
        return {name: route == number for number, name in enumerate(self.teachers)}

    def own_rows(self, name: str, view: View) -> View:
        """The view without the rows in which a teacher has no token, where it can do without them."""
        rows = view.supervised.any(1)
        with_images = any(image in view for image in IMAGE_INPUTS)
        if self.column is None or with_images or not isinstance(self.teachers[name], ModelTeacher):
            return view
        if not rows.any():
            # All ranks gather a sharded teacher together.
            rows[:1] = self._sharded
        return view if rows.all() else view.of_rows(rows)


@dataclass(frozen=True)
class SeveralTargets:
    """What a collator adds to a batch for several teachers: whom each row asks, and what those on disk said.

    Without the teachers themselves, which need not travel to the data loader's workers.
    """

    names: Sequence[str]
    caches: Mapping[str, CachedTeacher]
    column: str | None
    seen: Mapping[str, Seen] = field(default_factory=dict[str, Seen])
    """Rows with images as teachers see them that do not see what the student does."""

    @classmethod
    def of(cls, teachers: SeveralTeachers, seen: Mapping[str, Seen] | None = None) -> Self:
        """Those of these teachers."""
        return cls(list(teachers.teachers), teachers.caches, teachers.column, seen or {})

    def __call__(self, batch: Batch, examples: Sequence[Mapping[str, Any]]) -> Batch:
        """The filled batch. Raises UserError for a row that names none of the teachers."""
        asked: Sequence[Mapping[str, CachedTeacher]] = [self.caches] * len(examples)
        if self.column is not None:
            route = route_of(batch.student, examples, self.column, self.names)
            batch = replace(batch, student=replace(batch.student, route=route))
            names = [name for example in examples for name in teacher_names(example, self.column)]
            asked = [{name: self.caches[name]} if name in self.caches else {} for name in names]
        if self.caches:
            batch = with_answers_of(batch, examples, self.caches, asked, self.seen)
        return batch


def asked(
    teacher: Any, batch: Batch, ask: Callable[[Teacher[Any], str, View], Answer]
) -> Answer | MixedSignal[Answer] | RoutedSignal[Answer]:
    """What `ask` (teacher, its name, what it reads) gives for the only teacher, or for each of several."""
    if isinstance(teacher, SeveralTeachers):
        return teacher.about(batch, ask)
    return ask(teacher, ONLY, batch.teacher_view())


def pairs_of(teacher: Any, batch: Batch) -> dict[str, tuple[View, View]]:
    """What the student and each of several teachers, or the only one as `ONLY`, read where the teacher teaches."""
    return (
        teacher.pairs(batch) if isinstance(teacher, SeveralTeachers) else {ONLY: (batch.student, batch.teacher_view())}
    )


def student_views_of(teacher: Any, batch: Batch) -> dict[str, View]:
    """What the student reads, with labels where each of several teachers, or the only one as `ONLY`, teaches."""
    return teacher.student_views(batch) if isinstance(teacher, SeveralTeachers) else {ONLY: batch.student}


def is_routed(teacher: Any) -> bool:
    """Whether rows name their teachers."""
    return isinstance(teacher, SeveralTeachers) and teacher.column is not None


def named_parts(teacher: Any) -> dict[str, Any]:
    """Each of several teachers by its name, or the only one as `ONLY`."""
    return dict(teacher.teachers) if isinstance(teacher, SeveralTeachers) else {ONLY: teacher}


def served_parts(teacher: Any) -> dict[str, Any]:
    """Those of the teachers that servers answer for, by name; nothing where there is no teacher."""
    parts = {} if teacher is None else named_parts(teacher)
    return {name: part for name, part in parts.items() if part.served}


def parts_of(teacher: Any) -> list[Any]:
    """Each of several teachers, or the only one."""
    return list(named_parts(teacher).values())
