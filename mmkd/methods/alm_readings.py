"""Rows as student and teacher read them, each in its own tokens and by its own chat template, paired."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from datasets import Dataset
from transformers.utils import logging
from trl.data_utils import get_dataset_column_names

from mmkd.data.teacher_view import TeacherView
from mmkd.errors import UserError
from mmkd.models.backbone import name_of
from mmkd.models.load import load_processing_class
from mmkd.preparation.paired_streams import packed_stream, paired_stream
from mmkd.preparation.pairs import QUESTION, TEACHER, Agreement, BatchAligner, counts_of, numbered, packed, paired
from mmkd.preparation.prepared_rows import PreparedRows
from mmkd.preparation.row_views import RowView
from mmkd.teachers.cached import CachedTeacher
from mmkd.teachers.hidden_server import HiddenServerTeacher
from mmkd.teachers.local import LocalTeacher
from mmkd.teachers.self_teacher import SelfTeacher
from mmkd.teachers.server import ServerTeacher
from mmkd.teachers.several import is_routed, named_parts
from mmkd.teachers.teacher import Teacher
from mmkd.training.preparing import preparation_of
from mmkd.training.rewards import RATED
from mmkd.training.teacher_views import row_views_of

from .alm_config import ALMConfig
from .pair_rollouts import asked_columns, question_of, questions_of

_COUNTED = 256
"""Rows of a stream in which student and teacher are compared before training."""

logger = logging.get_logger(__name__)


@dataclass
class TeacherReader:
    """How rows become the tokens of teachers that read alike, and how these align with the student's."""

    prefix: str
    """Of the columns with the tokens."""
    rows: PreparedRows
    facts: Mapping[str, Any]
    """All that decides what is read."""
    aligner: BatchAligner | None = None
    view: RowView | None = None
    """Behind what else than the data's prompt the answer is read."""


class Readings:
    """Reads rows for teachers and aligns that with the student's reading; made before there is a Trainer."""

    def __init__(self, teacher: Any, processing_class: Any) -> None:
        """`processing_class` is the teacher's, or a mapping from the names of several; None finds them by names."""
        self._given, self._teachers = teacher, named_parts(teacher)
        self._column = teacher.column if is_routed(teacher) else None
        self._processing_class = processing_class
        self._readers: dict[str, TeacherReader] = {}

    def readers(self, dataset: Any, args: ALMConfig) -> dict[str, TeacherReader]:
        """What prepares rows for each teacher, by its name; those of the first data set read all others."""
        if not self._readers:
            views = row_views_of(self._given, args)
            for name, teacher in self._teachers.items():
                view, side = views.get(name), args.for_teacher(name in views)
                processing_class = self._processing_class_of(name, teacher, args)
                rows = PreparedRows.of(side, processing_class, dataset.take(1))
                if rows.labelling.vision:
                    rows = replace(rows, collator=replace(rows.collator, view=view))
                facts = preparation_of(
                    rows.labelling.processing_class,
                    rows.labelling.args,
                    rows.labelling.chat_template,
                    None if view is None else view.view,
                )
                alike = [reader for reader in self.distinct() if reader.facts == facts]
                prefix = f"{TEACHER}{len(self.distinct())}_" if self._readers else TEACHER
                self._readers[name] = alike[0] if alike else TeacherReader(prefix, rows, facts, view=view)
        return self._readers

    def distinct(self) -> list[TeacherReader]:
        """The readers, of teachers that read alike once."""
        return list({reader.prefix: reader for reader in self._readers.values()}.values())

    def of_row(self, row: Mapping[str, Any]) -> list[TeacherReader]:
        """Those that read a prepared row."""
        return self.distinct() if self._column is None else [self._readers[row[self._column]]]

    def _processing_class_of(self, name: str, teacher: Any, args: ALMConfig) -> Any:
        given = self._processing_class
        processing_class = given.get(name) if isinstance(given, Mapping) else given
        if processing_class is None and isinstance(teacher, SelfTeacher):
            processing_class = teacher.processing_class
        if processing_class is None and isinstance(teacher, ServerTeacher | HiddenServerTeacher):
            processing_class = teacher.tokenizer
        if processing_class is None:
            hub = {"trust_remote_code": args.trust_remote_code}
            processing_class = load_processing_class(_name_of(teacher), "teacher", **hub)
        return processing_class

    def align_with(self, processing_class: Any, args: ALMConfig) -> None:
        """Fits the readers to the student's tokenizer."""
        for reader in self.distinct():
            if reader.aligner is None:
                teacher = reader.rows.labelling.processing_class
                reader.aligner = BatchAligner.of(processing_class, teacher, to_space=args.chunks == "space")

    def _views(self) -> list[TeacherView]:
        return [reader.view.view for reader in self.distinct() if reader.view is not None]

    def _check_views(self, columns: Sequence[str], name: str) -> None:
        for view in self._views():
            view.check(columns, name)
            if {"messages", "prompt"}.isdisjoint(columns):
                raise UserError(
                    f"The {name} data is plain text, of which alm aligns everything, and teacher_view puts before it "
                    "what the student does not read. Map the data to prompt and completion, or use method kd.",
                    because="not built",
                )

    def columns(self) -> list[str]:
        """The columns of prepared rows of text that teachers read."""
        return [
            f"{reader.prefix}{name}" for reader in self.distinct() for name in ("input_ids", "labels", "seq_lengths")
        ]

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
        """The rows as all sides read them, a stream row by row; `read` is the student's reading.

        Raises UserError for rows that are tokens already, and where the sides share no text at all.
        """
        columns = get_dataset_column_names(dataset)
        self.readers(dataset, args)
        self.align_with(processing_class, args)
        if "teacher_input_ids" in columns:
            return dataset
        self._check_views(columns, name)
        if "input_ids" in columns:
            raise UserError(
                f"The {name} data is tokenised for the student already, so the teacher cannot read it. Pass its text.",
                because="meaning",
            )
        alone = copy(args)
        alone.shuffle_dataset = False
        ours = partial(read, args=alone)
        if isinstance(dataset, Dataset):
            both = self._paired(dataset, name, args, formatting_func, ours)
        else:
            both = self._paired_stream(dataset, name, args, formatting_func, ours)
        if args.shuffle_dataset:
            both = both.shuffle(seed=args.seed)
        if not packing:
            return both
        return packed(both, args) if isinstance(both, Dataset) else packed_stream(both, args)

    def _reads(self, reader: TeacherReader, name: str, formatting_func: Any) -> Callable[..., Any]:
        labelling = reader.rows.labelling
        settings = {"formatting_func": formatting_func, "split": f"{name} (teacher's)"}
        prepare = partial(labelling.prepare, args=labelling.args, packing=False, **settings)
        view = reader.view
        return prepare if view is None else lambda rows: prepare(view.of_data(rows))

    def _paired(self, dataset: Dataset, name: str, args: ALMConfig, formatting_func: Any, ours: Any) -> Dataset:
        rows, columns = numbered(dataset), dict[str, Any]()
        if args.on_policy_fraction:
            columns[QUESTION] = questions_of(dataset, args.rollout_prompt_tokens, self._views())
        if RATED in dataset.column_names:
            columns[RATED] = dataset[RATED][:]
        own = None
        if self._column is not None:
            columns[self._column] = dataset[self._column][:]
            own = [self._readers[teacher].prefix for teacher in columns[self._column]]
        theirs = {}
        for reader in self.distinct():
            its_rows = rows
            if own is not None:
                its_rows = rows.select([row for row, prefix in enumerate(own) if prefix == reader.prefix])
            if len(its_rows):
                theirs[reader.prefix] = self._reads(reader, name, formatting_func)(its_rows)
        both = paired(ours(rows), theirs, columns, own)
        for reader in self.distinct():
            if reader.prefix in theirs:
                about = f"Rows that one side cannot use: {len(dataset) - len(both)}."
                self._check_agreement(reader, both, name, about)
        return both

    def _paired_stream(self, dataset: Any, name: str, args: ALMConfig, formatting_func: Any, ours: Any) -> Any:
        if len(self.distinct()) > 1 or self._column is not None:
            raise UserError(
                f"The {name} data is a stream, and several teachers with tokens of their own read it. Load it whole, "
                "or mix teachers with one tokenizer.",
                because="not built",
            )
        columns = get_dataset_column_names(dataset)
        asked = asked_columns(columns, args.rollout_prompt_tokens, self._views()) if args.on_policy_fraction else None
        question = None if asked is None else partial(question_of, names=asked)
        (reader,) = self.distinct()
        sides = {"": ours, TEACHER: self._reads(reader, name, formatting_func)}
        both = paired_stream(dataset, sides, [name for name in (RATED,) if name in columns], question)
        first = Dataset.from_list(list(both.take(_COUNTED)))
        about = f"Counted on the first {len(first)} usable rows of the stream."
        self._check_agreement(reader, first, name, about)
        return both

    def _check_agreement(self, reader: TeacherReader, both: Dataset, name: str, about: str) -> None:
        """Says how much of paired rows student and teacher agree on. Raises UserError where that is nothing at all."""
        assert reader.aligner is not None
        read = (
            [number for number, row in enumerate(both[f"{reader.prefix}input_ids"]) if len(row)]
            if self._column
            else None
        )
        both = both if read is None else both.select(read)
        whose = [teacher for teacher, own in self._readers.items() if own is reader and teacher]
        if whose:
            name = f"{name}, {' and '.join(whose)}"
        agreement = Agreement.of(counts_of(both, reader.aligner, reader.prefix)) if len(both) else None
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
