"""Rows as student and teacher read them, each in its own tokens and by its own chat template, paired."""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

from datasets import Dataset
from transformers.utils import logging
from trl.data_utils import get_dataset_column_names

from mmkd.errors import UserError
from mmkd.models.backbone import name_of
from mmkd.models.load import load_processing_class
from mmkd.preparation.paired_streams import packed_stream, paired_stream
from mmkd.preparation.pairs import Agreement, BatchAligner, counts_of, numbered, packed, paired
from mmkd.preparation.prepared_rows import PreparedRows
from mmkd.teachers.cached import CachedTeacher
from mmkd.teachers.hidden_server import HiddenServerTeacher
from mmkd.teachers.local import LocalTeacher
from mmkd.teachers.server import ServerTeacher
from mmkd.teachers.teacher import Teacher

from .alm_config import ALMConfig
from .pair_rollouts import asked_columns, question_of, questions_of

_COUNTED = 256
"""Rows of a stream in which student and teacher are compared before training."""

logger = logging.get_logger(__name__)


class TwoReadings:
    """Reads rows for the teacher and aligns them with the student's reading; made before there is a Trainer."""

    def __init__(self, teacher: Any, processing_class: Any) -> None:
        """`processing_class` is the teacher's; None finds it by the teacher's name."""
        self._teacher, self._processing_class = teacher, processing_class
        self._reader: PreparedRows | None = None
        self._aligner: BatchAligner | None = None

    def reader(self, dataset: Any, args: ALMConfig) -> PreparedRows:
        """What prepares rows for the teacher; that of the first data set reads all others."""
        if self._reader is None:
            processing_class = self._processing_class
            if processing_class is None and isinstance(self._teacher, ServerTeacher | HiddenServerTeacher):
                processing_class = self._teacher.tokenizer
            if processing_class is None:
                hub = {"trust_remote_code": args.trust_remote_code}
                processing_class = load_processing_class(_name_of(self._teacher), "teacher", **hub)
            self._reader = PreparedRows.of(args.for_teacher(), processing_class, dataset.take(1))
        return self._reader

    def aligner(self, processing_class: Any, args: ALMConfig) -> BatchAligner:
        """What aligns the student's tokens, of this tokenizer, with the teacher's. Needs a reader before it."""
        if self._aligner is None:
            assert self._reader is not None
            teacher = self._reader.labelling.processing_class
            self._aligner = BatchAligner.of(processing_class, teacher, to_space=args.chunks == "space")
        return self._aligner

    def pair(
        self,
        dataset: Any,
        name: str,
        args: ALMConfig,
        packing: bool,
        formatting_func: Any,
        processing_class: Any,
        read: Callable[..., Any],
    ) -> Any:
        """The rows as both sides read them, a stream row by row; `read` is the student's reading.

        Raises UserError for rows that are tokens already, and where the sides share no text at all.
        """
        columns = get_dataset_column_names(dataset)
        if "teacher_input_ids" in columns:
            return dataset
        if "input_ids" in columns:
            raise UserError(
                f"The {name} data is tokenised for the student already, so the teacher cannot read it. Pass its text.",
                because="meaning",
            )
        alone = copy(args)
        alone.shuffle_dataset = False
        reader = self.reader(dataset, args).labelling
        ours = partial(read, args=alone)
        theirs = partial(
            reader.prepare,
            args=reader.args,
            packing=False,
            formatting_func=formatting_func,
            split=f"{name} (teacher's)",
        )
        aligner = self.aligner(processing_class, args)
        if isinstance(dataset, Dataset):
            rows = numbered(dataset)
            questions = questions_of(dataset, args.rollout_prompt_tokens) if args.on_policy_fraction else None
            both = paired(ours(rows), theirs(rows), questions)
            _check_agreement(both, aligner, name, f"Rows that one side cannot use: {len(dataset) - len(both)}.")
        else:
            asked = asked_columns(columns, args.rollout_prompt_tokens) if args.on_policy_fraction else None
            question = None if asked is None else partial(question_of, names=asked)
            both = paired_stream(dataset, ours, theirs, question)
            first = Dataset.from_list(list(both.take(_COUNTED)))
            _check_agreement(first, aligner, name, f"Counted on the first {len(first)} usable rows of the stream.")
        if args.shuffle_dataset:
            both = both.shuffle(seed=args.seed)
        if not packing:
            return both
        return packed(both, args) if isinstance(both, Dataset) else packed_stream(both, args)


def _check_agreement(both: Dataset, aligner: BatchAligner, name: str, about: str) -> None:
    """Says how much of paired rows both sides agree on. Raises UserError where that is nothing at all."""
    agreement = Agreement.of(counts_of(both, aligner)) if len(both) else None
    if agreement is None or not agreement.chunks:
        raise UserError(
            f"Student and teacher share no chunk of text in any of the {len(both)} usable rows of {name}: their "
            "tokens, or what their chat templates supervise, have no bytes in common. First row: "
            f"{both[0] if len(both) else None}"
        )
    logger.warning(f"{name}: {agreement} {about}")


def _name_of(teacher: Any) -> str:
    """The name under which a teacher's tokenizer is found."""
    if isinstance(teacher, CachedTeacher):
        return teacher.cache.manifest.identity["teacher"]["name"]
    if isinstance(teacher, LocalTeacher):
        teacher = teacher.model
    if isinstance(teacher, ServerTeacher | HiddenServerTeacher) and teacher.teacher is not None:
        return teacher.teacher
    if isinstance(teacher, Teacher):
        raise UserError(
            f"A {type(teacher).__name__} does not tell its tokenizer: name the teacher (recipe: `teacher`; in Python "
            "teacher=... where it is made), or pass teacher_processing_class."
        )
    return teacher if isinstance(teacher, str) else name_of(teacher)
