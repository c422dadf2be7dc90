"""Whether models and data fit each other, looked at before training: tokens, positions, ends of answers, packing."""

from collections.abc import Iterable
from typing import Any

from datasets import Dataset
from transformers.utils import logging

from mmkd.errors import UserError
from mmkd.models.backbone import base_of
from mmkd.models.packing import check_packing
from mmkd.preparation.collation import VisionViews
from mmkd.preparation.fit import (
    Extent,
    Misfit,
    add_stops,
    answer_ends,
    lacking_positions,
    lacking_tokens,
    unknown_answers,
)
from mmkd.preparation.sampled import SampledRow, sample_of
from mmkd.teachers.local import LocalTeacher
from mmkd.teachers.several import named_parts, parts_of

from .preparing import sequences_of
from .teaching import StudentSide, Teaching

logger = logging.get_logger(__name__)


def check_fit(student: StudentSide, teaching: Teaching) -> None:
    """Raises UserError where the data has tokens or positions that a model lacks; says what may go wrong."""
    sides: list[tuple[str, str | None, Any, str]] = [("student", None, student.model, "")]
    for name, teacher in named_parts(teaching.teacher).items():
        if isinstance(teacher, LocalTeacher):
            sides.append(("teacher", name, teacher.model, teaching.columns.get(name, "")))
    misfits: list[Misfit] = []
    for role, name, model, prefix in sides:
        extent, config = Extent.of_rows(sample_seen_by(student, name, prefix)), base_of(model).config
        for dataset in student.splits.values():
            extent |= Extent.of(dataset, prefix)
        needed: dict[str, int | None] = {}
        if role == "student":
            needed["the image token"] = getattr(config, "image_token_id", None)
            if not student.padding_free:
                needed["the padding token"] = student.tokenizer.pad_token_id
            misfits += unknown_answers(extent.supervised, teaching.vocab_size, student.tokenizer)
        embeddings: Any = base_of(model).get_input_embeddings()
        misfits += lacking_tokens(role, embeddings.num_embeddings, extent.highest, needed)
        misfits += lacking_positions(role, config, extent.longest, None)
    if fatal := [str(misfit) for misfit in misfits if misfit.fatal]:
        raise UserError(" ".join(fatal))
    for misfit in misfits:
        logger.warning(str(misfit))


def sample_seen_by(student: StudentSide, teacher: str | None = None, prefix: str = "") -> list[SampledRow]:
    """Sampled rows as the student or a teacher (by name) sees them, within max_length.

    A teacher sees them by its own processor, or in its own columns.
    """
    views = student.views
    if not isinstance(views, VisionViews):
        return (
            sample_of(student.train, None, prefix) if prefix else student.labelling.sampled_rows(student.train, None)
        )
    if teacher in views.teachers:
        rows = sample_of(student.train, views.teachers[teacher])
    else:
        rows = student.labelling.sampled_rows(student.train, views.student)
    return [SampledRow(*(part[: views.max_length] for part in row)) for row in rows]


def stop_where_answers_end(student: StudentSide) -> None:
    """Lets the student's generation stop at what most answers of the data end with, as their template says."""
    base, tokenizer, train = base_of(student.model), student.tokenizer, student.train
    if base.generation_config is None:
        return
    rows: Iterable[tuple[Any, Any]] = sample_seen_by(student)
    if isinstance(train, Dataset) and "labels" in train.column_names:
        rows = ((sequence.ids, sequence.supervised) for sequence in sequences_of(train))
    ends = answer_ends(rows, tokenizer)
    # The Trainer adds the tokenizer's EOS itself.
    added = add_stops(base.generation_config, [index for index in ends if index != tokenizer.eos_token_id])
    if added:
        stops = ", ".join(map(str, tokenizer.convert_ids_to_tokens(added)))
        logger.warning(
            f"The answers end with {stops}, at which the student's generation did not stop. From now on it does, "
            "and so does the saved student (generation_config.eos_token_id)."
        )


def check_rows_apart(student: StudentSide, teaching: Teaching, collate: Any, one_vocabulary: bool) -> None:
    """Looks whether rows that are laid end to end stay apart in student and teachers."""
    tokenizer = student.tokenizer
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    check_packing(student.model, "student", collate, special)
    for teacher in parts_of(teaching.teacher) if one_vocabulary else []:
        if isinstance(teacher, LocalTeacher):
            check_packing(teacher.model, "teacher", collate, special, teacher.wrapped)
