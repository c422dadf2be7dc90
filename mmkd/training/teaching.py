"""The teacher of a training, or several, found and checked against the student and its data."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, ProcessorMixin

from mmkd.alignment.vocab import shared_tokens
from mmkd.errors import UserError
from mmkd.models.backbone import full_head, name_of
from mmkd.models.load import load_processing_class, tokenizer_of
from mmkd.models.quantised_students import load_as_trained
from mmkd.precision import say_emulated
from mmkd.preparation.collation import Fill, TextViews, VisionViews
from mmkd.preparation.labelling import Labelling
from mmkd.preparation.pairs import TEACHER, packed
from mmkd.preparation.teacher_prompts import prefixes_of
from mmkd.preparation.vision_checks import processor_of_teacher
from mmkd.teachers.batch import ONLY
from mmkd.teachers.cached import CachedTeacher, Seen, with_targets
from mmkd.teachers.local import LocalTeacher
from mmkd.teachers.routes import teacher_names
from mmkd.teachers.server import ServerTeacher
from mmkd.teachers.several import SeveralTargets, SeveralTeachers, parts_of
from mmkd.teachers.teacher import DenseTeacher, Teacher

from .config import DistillationConfig
from .preparing import preparation_of, sequences_of
from .rewards import RATED
from .teacher_views import row_views_of, teacher_views_of


@dataclass(frozen=True)
class StudentSide:
    """The student of a training and its prepared rows: what a teacher is fitted to."""

    model: Any
    processing_class: Any
    args: DistillationConfig
    labelling: Labelling
    train: Any
    evaluation: Any
    views: TextViews | VisionViews
    padding_free: bool

    @property
    def tokenizer(self) -> Any:
        return tokenizer_of(self.processing_class)

    @property
    def tokens(self) -> int:
        """The rows of the student's vocabulary."""
        return full_head(self.model).vocab_size

    @property
    def splits(self) -> dict[str, Any]:
        """The rows by split, of several evaluations each by its name."""
        evaluation = self.evaluation if isinstance(self.evaluation, Mapping) else {"eval": self.evaluation}
        return {"train": self.train, **evaluation}


@dataclass(frozen=True)
class Teaching:
    """The teacher of a training, and what follows from it for student and batches."""

    teacher: Teacher[Any] | None
    vocab_size: int
    """The tokens that student and teacher are compared on."""
    fill: Fill | None = None
    """What the collator adds to a batch for it."""
    processors: Mapping[str, ProcessorMixin] = field(default_factory=dict[str, ProcessorMixin])
    """With which it reads images, or each of several, by its name."""
    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    """What begins the names of the columns that it reads, or each of several, where they are not the student's."""


def teaching_of(student: StudentSide, teacher: Any, processing_class: Any) -> Teaching:
    """The teacher that a trainer was given, checked against student and data. Leaves what it is given as it is."""
    views = teacher_views_of(teacher, student.args)
    if not views or not isinstance(student.views, TextViews):
        return _fitted(student, teacher, processing_class)
    columns = prefixes_of(views)
    for split, rows in student.splits.items():
        first = None if rows is None else next(iter(rows), None)
        if first is not None and f"{TEACHER}input_ids" not in first:
            raise UserError(
                f"The {split} rows are tokens already (skip_prepare_dataset), and teacher_view is about text. Pass "
                f"rows of text, or add what the teacher reads as {TEACHER}input_ids and {TEACHER}labels.",
                because="meaning",
            )
    return replace(_fitted(student, teacher, processing_class), columns=columns)


def _fitted(student: StudentSide, teacher: Any, processing_class: Any) -> Teaching:
    if teacher is None:
        return Teaching(None, student.tokens)
    if isinstance(teacher, SeveralTeachers):
        return _several(student, teacher, processing_class)
    if isinstance(teacher, CachedTeacher):
        _check_cache(student, teacher)
        tokens = min(student.tokens, teacher.vocab_size)
        # A head can be cut to what the student knows; what is listed of a distribution cannot.
        teacher = teacher if teacher.states is None else teacher.over_tokens(tokens)
        seen = _seen(student, teacher).get(ONLY)
        return Teaching(teacher, tokens, partial(with_targets, teacher=teacher, seen=seen))
    if isinstance(teacher, DenseTeacher):
        tokens = min(student.tokens, teacher.vocab_size)
        return Teaching(teacher.over_tokens(tokens), tokens, processors=_own_processor(student, ONLY, teacher))
    if isinstance(teacher, Teacher):
        return Teaching(teacher, student.tokens, processors=_own_processor(student, ONLY, teacher))
    return _local(student, teacher, processing_class)


def _own_processor(student: StudentSide, name: str, teacher: Teacher[Any]) -> dict[str, ProcessorMixin]:
    """With what a teacher that is not loaded here reads images, if it says so."""
    if teacher.processor is None or not isinstance(student.views, VisionViews):
        return {}
    return {name: teacher.processor}


def load_teacher(teacher: str | PreTrainedModel, args: DistillationConfig) -> PreTrainedModel:
    """The model of a name, with `teacher_model_init_kwargs`; a model as it is."""
    if not isinstance(teacher, str):
        return teacher
    settings = args.teacher_model_init_kwargs or {}
    assert isinstance(settings, dict)
    init = {"dtype": "auto", "trust_remote_code": args.trust_remote_code, **settings}
    return load_as_trained(teacher, "teacher", device=args.device, **init)


def _local(student: StudentSide, teacher: str | PreTrainedModel, processing_class: Any) -> Teaching:
    args, model = student.args, load_teacher(teacher, student.args)
    say_emulated("teacher", model.dtype, args.device)
    if processing_class is None:
        trust = args.trust_remote_code
        processing_class = load_processing_class(name_of(model), "teacher", trust_remote_code=trust)
    vision = isinstance(student.views, VisionViews)
    processors = {ONLY: processor_of_teacher(processing_class, name_of(model))} if vision else {}
    rows = full_head(model).vocab_size
    tokens = shared_tokens(student.tokenizer, tokenizer_of(processing_class), student.tokens, rows)
    return Teaching(LocalTeacher(model, tokens), tokens, processors=processors)


def _several(student: StudentSide, several: SeveralTeachers, processing_class: Any) -> Teaching:
    check_all_teach(several, student.train)
    tokens, teachers, processors = student.tokens, dict(several.teachers), dict[str, ProcessorMixin]()
    for name, teacher in several.teachers.items():
        if isinstance(teacher, CachedTeacher):
            _check_cache(student, teacher, name, several)
            tokens = min(tokens, teacher.vocab_size)
        elif not isinstance(teacher, Teacher):
            built = _local(student, teacher, processing_class)
            teachers[name], tokens = built.teacher, min(tokens, built.vocab_size)
            if ONLY in built.processors:
                processors[name] = built.processors[ONLY]
        elif isinstance(teacher, DenseTeacher | ServerTeacher) and teacher.vocab_size is not None:
            tokens = min(tokens, teacher.vocab_size)
        if isinstance(teacher, Teacher):
            processors |= _own_processor(student, name, teacher)
    for name, teacher in teachers.items():
        is_cut = isinstance(teacher, CachedTeacher) and teacher.states is not None
        if is_cut or isinstance(teacher, DenseTeacher | ServerTeacher):
            teachers[name] = teacher.over_tokens(tokens)
        elif isinstance(teacher, CachedTeacher) and teacher.vocab_size > tokens:
            raise UserError(
                f"The cache of the teacher {name!r} speaks of {teacher.vocab_size} tokens, but the student and "
                f"all teachers share {tokens} only. Use teachers with one tokenizer.",
                because="not built",
            )
    several = several.replaced_by(teachers)
    return Teaching(several, tokens, SeveralTargets.of(several, _seen(student, several)), processors)


def _seen(student: StudentSide, teacher: Any) -> dict[str, Seen]:
    """By name, rows with images as teachers see them that do not see what the student does."""
    views = row_views_of(teacher, student.args) if student.labelling.vision else {}
    return {name: view.rewrite for name, view in views.items()}


def check_all_teach(several: SeveralTeachers, train: Any) -> None:
    """Raises UserError where rows name their teachers, and one of these has no row of the train data."""
    for name in several.teachers if several.column and isinstance(train, Dataset) else ():
        if not len(_rows_of(train, several.column or "", name)):
            raise UserError(
                f"No row of the train data names {name!r} in its {several.column}. Correct the name, or remove a "
                "teacher that has nothing to teach."
            )


def _check_cache(
    student: StudentSide, teacher: CachedTeacher, name: str = ONLY, several: SeveralTeachers | None = None
) -> None:
    """Raises UserError where a cache, of one of several teachers by its name, is not of what that one reads here."""
    if teacher.vocab_size > student.tokens and teacher.states is None:
        raise UserError(
            f"The cache {teacher.cache.folder} speaks of {teacher.vocab_size} tokens, the student has "
            f"{student.tokens}. Build it again with this student.",
            because="meaning",
        )
    views = teacher_views_of(teacher if several is None else several, student.args)
    template = student.labelling.chat_template
    teacher.check(preparation_of(student.processing_class, student.args, template, views.get(name)))
    prefix = prefixes_of(views).get(name, "") if isinstance(student.views, TextViews) else ""
    _check_sequences(student, teacher, prefix, None if several is None else several.column, name)


def _check_sequences(student: StudentSide, teacher: CachedTeacher, prefix: str, column: str | None, name: str) -> None:
    """Raises UserError when the cache lacks a row; with a column, one in which that has the teacher's name."""
    for split, dataset in student.splits.items():
        if isinstance(dataset, Dataset) and "labels" in dataset.column_names:
            located = sequences_of(dataset, prefix)
            if column is not None:
                named = (own for value in dataset[column] for own in teacher_names({column: value}, column))
                located = (sequence for sequence, own in zip(located, named, strict=True) if own == name)
            teacher.check_sequences(((sequence.ids, sequence.supervised) for sequence in located), split)


def first_rows(teacher: Teacher[Any], train: Any) -> Iterator[dict[str, Any]]:
    """Rows to ask about before training: the first, and where rows name their teachers the first of each."""
    if isinstance(teacher, SeveralTeachers) and teacher.column and isinstance(train, Dataset):
        for name in teacher.teachers:
            yield from map(dict, islice(_rows_of(train, teacher.column, name), 1))
    else:
        yield dict(next(iter(train)))


def packed_apart(prepare: Callable[..., Any], rows: Any, args: DistillationConfig, column: str) -> Any:
    """Rows that name their teachers in a column, packed; each sequence keeps its teacher. `prepare` makes tokens.

    Raises UserError for a strategy that cuts sequences or joins them, and for streams.
    """
    if not isinstance(rows, Dataset):
        raise UserError(
            f"A stream that is packed does not keep apart which row names which teacher in {column!r}. Load the data "
            "whole, or set packing: false (padding_free: true wastes nothing either).",
            because="not built",
        )
    if args.packing_strategy != "bfd":
        raise UserError(
            f"packing_strategy: {args.packing_strategy} does not keep apart which row names which teacher in "
            f"{column!r}. Set packing_strategy: bfd, or packing: false (padding_free: true wastes nothing either).",
            because="not built",
        )
    if "seq_lengths" in rows.column_names:
        return rows
    more = [column, *(name for name in (RATED,) if name in rows.column_names)]
    return packed(prepare(rows, packing=False).select_columns(["input_ids", "labels", *more]), args)


def check_several(trainer: Any, teachers: SeveralTeachers, args: DistillationConfig, data: Mapping[Any, Any]) -> None:
    """Raises UserError where the method takes one teacher only, or rows (by split) do not name theirs."""
    if not trainer.takes_several:
        raise UserError(
            f"Method {trainer.method} learns from one teacher. Several can teach kd, taid, alm and llava_kd; distil "
            "one after the other, or merge them before.",
            because="not built",
        )
    if teachers.column is None:
        return
    evaluation = data.get("eval")
    splits = data if not isinstance(evaluation, Mapping) else {**data, **evaluation}
    for split, rows in splits.items():
        if not isinstance(rows, Dataset):
            continue
        if teachers.column not in rows.column_names:
            raise UserError(
                f"The {split} data has no column {teachers.column!r} to name the teacher of each row; it has "
                f"{', '.join(rows.column_names)}. Map one in the data recipe, or mix the teachers by weights."
            )
        unknown = sorted(map(repr, {*rows.unique(teachers.column)} - teachers.teachers.keys()))
        if unknown:
            raise UserError(
                f"The {split} data names teachers that there are not: {', '.join(unknown[:8])}. The teachers are "
                f"{', '.join(map(repr, teachers.teachers))}."
            )


def check_teachers(trainer: Any, teacher: Any, args: DistillationConfig, data: Mapping[str, Any]) -> None:
    """Raises UserError where a trainer's class cannot learn from the teacher, or one of several, that it is given."""
    if isinstance(teacher, SeveralTeachers):
        check_several(trainer, teacher, args, data)
    if not teacher_views_of(teacher, args):
        _check_no_view(args)
    for part in parts_of(teacher):
        if isinstance(part, Teacher):
            trainer.check_teacher(part, args)


def _check_no_view(args: DistillationConfig) -> None:
    if args.view is not None:
        raise UserError(
            "teacher_view says what the teacher reads, and there is no teacher. Set one, or remove teacher_view.",
            because="meaning",
        )
    if args.privileged_dropout:
        raise UserError(
            f"privileged_dropout is {args.privileged_dropout}, and there is no teacher_view to leave out. Set "
            "teacher_view, or remove privileged_dropout.",
            because="meaning",
        )
    if args.teacher_max_length is not None and not args.own_tokens:
        raise UserError(
            f"teacher_max_length is {args.teacher_max_length}, and without a teacher_view the teacher reads the "
            "student's rows, which max_length limits. Set max_length, or remove teacher_max_length.",
            because="meaning",
        )


def _rows_of(dataset: Dataset, column: str, name: str) -> Dataset:
    """The rows whose column names this teacher, for one of their sequences at least."""
    named = (teacher_names({column: value}, column) for value in dataset[column])
    return dataset.select([row for row, names in enumerate(named) if name in names])
