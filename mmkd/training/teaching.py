"""The part of the distillation trainer that finds its teacher, or several, and fits them to student and data."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, ClassVar

from datasets import Dataset
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from mmkd.alignment.vocab import shared_tokens
from mmkd.errors import UserError
from mmkd.models.backbone import base_of, full_head, name_of
from mmkd.models.load import load_model, load_processing_class, tokenizer_of
from mmkd.models.packing import check_packing
from mmkd.precision import say_emulated
from mmkd.preparation.collation import Fill, TextViews, VisionViews
from mmkd.preparation.fit import (
    Extent,
    Misfit,
    add_stops,
    answer_ends,
    lacking_positions,
    lacking_tokens,
    unknown_answers,
)
from mmkd.preparation.labelling import LabellingTrainer
from mmkd.preparation.sampled import SampledRow, sample_of
from mmkd.preparation.vision_checks import processor_of_teacher
from mmkd.teachers.base import Teacher
from mmkd.teachers.cached import CachedTeacher, with_targets
from mmkd.teachers.local import LocalTeacher
from mmkd.teachers.server import ServerTeacher
from mmkd.teachers.several import SeveralTargets, SeveralTeachers, parts_of

from .config import DistillationConfig
from .preparing import preparation_of, sequences_of
from .reports import ReportingTrainer

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Teaching:
    """The teacher of a training, and what follows from it for student and batches."""

    teacher: Teacher[Any] | None
    vocab_size: int
    """The tokens that student and teacher are compared on."""
    fill: Fill | None = None
    """What the collator adds to a batch for it."""
    processor: ProcessorMixin | None = None
    """With which it reads images."""


class TaughtTrainer(ReportingTrainer, LabellingTrainer):
    """trl's SFTTrainer that can build a teacher of what its constructor was given."""

    method: ClassVar[str]
    one_vocabulary: ClassVar[bool]
    takes_several: ClassVar[bool] = False
    """Whether several teachers may teach at a time."""

    args: DistillationConfig
    # transformers types these as unions with None, for trainers that are still without them.
    teacher: Any
    train_dataset: Any
    processing_class: Any
    data_collator: Any
    views: TextViews | VisionViews
    vocab_size: int
    _given_teacher: tuple[Any, Any]

    @classmethod
    def check_several(cls, teachers: SeveralTeachers, args: DistillationConfig, data: Mapping[str, Any]) -> None:
        """Raises UserError where the method takes one teacher only, or rows (by split) do not name theirs."""
        if not cls.takes_several:
            raise UserError(
                f"Method {cls.method} learns from one teacher. Several can teach kd and taid; distil one after the "
                "other, or merge them before."
            )
        if teachers.column is None:
            return
        if args.packing or args.eval_packing:
            raise UserError(
                f"Packing joins rows of different teachers, so that the column {teachers.column!r} cannot say whom to "
                "ask. Set packing: false (padding_free: true wastes nothing either), or mix the teachers by weights."
            )
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

    def build_teacher(self, teacher: Any, processing_class: Any) -> Teaching:
        """The teacher of the constructor's arguments, checked against student and data, and what follows from it."""
        tokens = full_head(self.model).vocab_size
        if teacher is None:
            return Teaching(None, tokens)
        if isinstance(teacher, SeveralTeachers):
            return self._build_several(teacher, processing_class)
        if isinstance(teacher, CachedTeacher):
            self._check_cache(teacher)
            self._check_sequences(teacher)
            return Teaching(teacher, min(tokens, teacher.vocab_size), partial(with_targets, teacher=teacher))
        if isinstance(teacher, Teacher):
            return Teaching(teacher, tokens)
        return self._build_local(teacher, processing_class)

    def load_teacher(self, teacher: str | PreTrainedModel) -> PreTrainedModel:
        """The model of a name, with `teacher_model_init_kwargs`; a model as it is."""
        if not isinstance(teacher, str):
            return teacher
        given = self.args.teacher_model_init_kwargs or {}
        assert isinstance(given, dict)
        trust = self.args.trust_remote_code
        init = {"dtype": "auto", "trust_remote_code": trust, **given}
        return load_model(teacher, "teacher", device=self.args.device, **init)

    def _build_local(self, teacher: str | PreTrainedModel, processing_class: Any) -> Teaching:
        model = self.load_teacher(teacher)
        say_emulated("teacher", model.dtype, self.args.device)
        if processing_class is None:
            trust = self.args.trust_remote_code
            processing_class = load_processing_class(name_of(model), "teacher", trust_remote_code=trust)
        vision = isinstance(self.views, VisionViews)
        processor = processor_of_teacher(processing_class, name_of(model)) if vision else None
        rows = (full_head(one).vocab_size for one in (self.model, model))
        tokens = shared_tokens(tokenizer_of(self.processing_class), tokenizer_of(processing_class), *rows)
        return Teaching(LocalTeacher(model, tokens), tokens, processor=processor)

    def _build_several(self, several: SeveralTeachers, processing_class: Any) -> Teaching:
        tokens, teachers = full_head(self.model).vocab_size, dict(several.teachers)
        for name, teacher in several.teachers.items():
            if several.column and isinstance(self.train_dataset, Dataset):
                self._check_named(several.column, name)
            if isinstance(teacher, CachedTeacher):
                self._check_cache(teacher)
                self._check_sequences(teacher, several.column, name)
                tokens = min(tokens, teacher.vocab_size)
            elif not isinstance(teacher, Teacher):
                built = self._build_local(teacher, processing_class)
                teachers[name], tokens = built.teacher, min(tokens, built.vocab_size)
                alike = built.processor is None or self.views.reads_alike(built.processor)
                if not alike:
                    raise UserError(
                        "One of several teachers reads images in another way than the student, and a batch holds one "
                        "version besides the student's. Use teachers with the student's processor, or one teacher."
                    )
            elif isinstance(teacher, LocalTeacher | ServerTeacher) and teacher.vocab_size is not None:
                tokens = min(tokens, teacher.vocab_size)
        for name, teacher in teachers.items():
            if isinstance(teacher, LocalTeacher | ServerTeacher):
                teachers[name] = teacher.over_tokens(tokens)
            elif isinstance(teacher, CachedTeacher) and teacher.vocab_size > tokens:
                raise UserError(
                    f"The cache of the teacher {name!r} speaks of {teacher.vocab_size} tokens, but the student and "
                    f"all teachers share {tokens} only. Use teachers with one tokenizer."
                )
        several = several.replaced_by(teachers)
        return Teaching(several, tokens, SeveralTargets.of(several))

    def _check_fit(self) -> None:
        """Raises UserError where the data has tokens or positions that a model lacks; says what may go wrong."""
        evaluation = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        tokenizer: Any = tokenizer_of(self.processing_class)
        sides: list[tuple[str, Any, str]] = [("student", self.model, "")]
        for teacher in parts_of(self.teacher):
            if isinstance(teacher, LocalTeacher):
                sides.append(("teacher", teacher.model, "" if self.one_vocabulary else "teacher_"))
        misfits: list[Misfit] = []
        for role, model, prefix in sides:
            extent, config = Extent.of_rows(self._sample_seen_by(role, prefix)), base_of(model).config
            for dataset in (self.train_dataset, *evaluation.values()):
                extent |= Extent.of(dataset, prefix)
            needed: dict[str, int | None] = {}
            if role == "student":
                needed["the image token"] = getattr(config, "image_token_id", None)
                if not self.padding_free:
                    needed["the padding token"] = tokenizer.pad_token_id
                misfits += unknown_answers(extent.supervised, self.vocab_size, tokenizer)
            embeddings: Any = base_of(model).get_input_embeddings()
            misfits += lacking_tokens(role, embeddings.num_embeddings, extent.highest, needed)
            misfits += lacking_positions(role, config, extent.longest, None)
        if fatal := [str(one) for one in misfits if one.fatal]:
            raise UserError(" ".join(fatal))
        for one in misfits:
            logger.warning(str(one))

    def _sample_seen_by(self, role: str, prefix: str) -> list[SampledRow]:
        """`sampled_rows` as a side sees them: by its own processor, or in its own columns, and within max_length."""
        vision, rows = self.views, self.sampled_rows()
        if isinstance(vision, VisionViews):
            if role == "teacher" and vision.teacher is not None:
                rows = sample_of(self.train_dataset, vision.teacher)
            return [SampledRow(*(part[: vision.max_length] for part in row)) for row in rows]
        return sample_of(self.train_dataset, None, prefix) if prefix else rows

    def _stop_where_answers_end(self) -> None:
        """Lets the student's generation stop at what most answers of the data end with, as their template says."""
        base, tokenizer = base_of(self.model), tokenizer_of(self.processing_class)
        dataset: Any = self.train_dataset
        if base.generation_config is None:
            return
        rows: Iterable[tuple[Any, Any]] = self._sample_seen_by("student", "")
        if isinstance(dataset, Dataset) and "labels" in dataset.column_names:
            rows = ((one.ids, one.supervised) for one in sequences_of(dataset))
        ends = answer_ends(rows, tokenizer)
        # The Trainer adds the tokenizer's EOS itself.
        added = add_stops(base.generation_config, [index for index in ends if index != tokenizer.eos_token_id])
        if added:
            told = ", ".join(map(str, tokenizer.convert_ids_to_tokens(added)))
            logger.warning(
                f"The answers end with {told}, at which the student's generation did not stop. From now on it does, "
                "and so does the saved student (generation_config.eos_token_id)."
            )

    def _check_packing(self, collate: Any) -> None:
        """Looks whether rows that are laid end to end stay apart in student and teachers."""
        tokenizer: Any = tokenizer_of(self.processing_class)
        special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        check_packing(self.model, "student", collate, special)
        for teacher in parts_of(self.teacher) if self.one_vocabulary else []:
            if isinstance(teacher, LocalTeacher):
                check_packing(teacher.model, "teacher", collate, special, teacher.wrapped)

    def _check_named(self, column: str, name: str) -> None:
        if not len(_rows_of(self.train_dataset, column, name)):
            raise UserError(
                f"No row of the train data names {name!r} in its {column}. Correct the name, or remove a teacher that "
                "has nothing to teach."
            )

    def _check_cache(self, teacher: CachedTeacher) -> None:
        if teacher.vocab_size > full_head(self.model).vocab_size:
            raise UserError(
                f"The cache {teacher.cache.folder} speaks of {teacher.vocab_size} tokens, the student has "
                f"{full_head(self.model).vocab_size}. Build it again with this student."
            )
        teacher.check(preparation_of(self.processing_class, self.args, self.chat_template))

    def _check_sequences(self, teacher: CachedTeacher, column: str | None = None, name: str = "") -> None:
        """Raises UserError when the cache lacks a row; with a column, one in which that has the teacher's name."""
        evaluation = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        for split, dataset in {"train": self.train_dataset, **evaluation}.items():
            if isinstance(dataset, Dataset) and "labels" in dataset.column_names:
                rows = dataset if column is None else _rows_of(dataset, column, name)
                teacher.check_sequences(((one.ids, one.supervised) for one in sequences_of(rows)), split)

    def _first_rows(self, teacher: Teacher) -> Iterator[dict[str, Any]]:
        """Rows to ask about before training: the first, and where rows name their teachers the first of each."""
        if isinstance(teacher, SeveralTeachers) and teacher.column and isinstance(self.train_dataset, Dataset):
            for name in teacher.teachers:
                yield from map(dict, islice(_rows_of(self.train_dataset, teacher.column, name), 1))
        else:
            yield dict(next(iter(self.train_dataset)))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        teacher, columns = self._given_teacher[0], self._signature_columns
        assert columns is not None
        if isinstance(teacher, SeveralTeachers) and teacher.column not in (None, *columns):
            columns.append(str(teacher.column))


def check_teachers(trainer: Any, teacher: Any, args: DistillationConfig, data: Mapping[str, Any]) -> None:
    """Raises UserError where a trainer's class cannot learn from the teacher, or one of several, that it is given."""
    if isinstance(teacher, SeveralTeachers):
        trainer.check_several(teacher, args, data)
    for one in parts_of(teacher):
        if isinstance(one, Teacher):
            trainer.check_teacher(one, args)


def _rows_of(dataset: Dataset, column: str, name: str) -> Dataset:
    """The rows whose column names this teacher."""
    return dataset.select([row for row, one in enumerate(dataset[column]) if one == name])
