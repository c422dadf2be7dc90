"""Rows that student and teacher read in tokens of their own: prepared for each, laid side by side, aligned."""

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from jaxtyping import Bool, Int
from trl.data_utils import pack_dataset
from trl.trainer.sft_config import SFTConfig

from mmkd.alignment.pieces import TokenPieces, Tokens
from mmkd.alignment.spans import Aligner, Chunks, RowCounts
from mmkd.models.load import tokenizer_of
from mmkd.teachers.batch import View
from mmkd.teachers.cached import spans_of_row
from mmkd.teachers.routes import teacher_names
from mmkd.teachers.signals import ChunkAlignment

QUESTION = "question"
"""Column with a row's prompt as JSON, where the student may answer it anew."""

TEACHER = "teacher_"
"""What begins the names of columns with what the teacher reads; with what others read, `teacher_1_` and so on."""

_COLUMNS = ("input_ids", "labels")
_ROW = "mmkd_row"
_COUNTED = 1000


def numbered(dataset: Dataset) -> Dataset:
    """The rows with their numbers, by which those that survive two preparations are paired."""
    return dataset.add_column(_ROW, list(range(len(dataset))))  # pyright: ignore[reportCallIssue]


def paired(
    student: Dataset,
    teachers: Mapping[str, Dataset],
    columns: Mapping[str, Sequence[Any]],
    readers: Sequence[str] | None = None,
) -> Dataset:
    """The numbered rows that all sides can use, with what each teacher reads in columns with its prefix.

    `columns` hold more for every row, by its number. Where `readers` names one prefix for each row, the row has
    nothing in the columns of the others, and need not be usable to them.
    """
    ours = _numbers(student)
    wanted = {
        prefix: np.array([readers is None or readers[row] == prefix for row in ours.tolist()], dtype=bool)
        for prefix in teachers
    }
    kept = np.ones(len(ours), dtype=bool)
    for prefix, rows in teachers.items():
        kept &= ~wanted[prefix] | np.isin(ours, _numbers(rows))
    both = [student.select(np.flatnonzero(kept)).select_columns(list(_COLUMNS))]
    for prefix, rows in teachers.items():
        places = {number: place for place, number in enumerate(_numbers(rows).tolist())}
        pairs = zip(ours[kept].tolist(), wanted[prefix][kept].tolist(), strict=True)
        chosen = [places[number] if needed else len(rows) for number, needed in pairs]
        rows = rows.select_columns(list(_COLUMNS))
        if readers is not None:
            empty = Dataset.from_dict({name: [[]] for name in _COLUMNS}, features=rows.features)
            rows = concatenate_datasets([rows, empty])
        both.append(rows.select(chosen).rename_columns({name: f"{prefix}{name}" for name in _COLUMNS}))
    whole: Any = concatenate_datasets(both, axis=1)
    for name, values in columns.items():
        whole = whole.add_column(name, [values[row] for row in ours[kept].tolist()])
    return whole


def _numbers(rows: Dataset) -> Int[np.ndarray, "row"]:
    return np.asarray(rows.with_format("numpy")[_ROW][:], dtype=np.int64)


def teacher_prefixes(columns: Sequence[str]) -> list[str]:
    """What begins the names of the columns that hold what a teacher reads, for each of these."""
    return [name.removesuffix("input_ids") for name in columns if re.fullmatch(r"teacher_(\d+_)?input_ids", name)]


def packed(rows: Dataset, args: SFTConfig) -> Dataset:
    """Paired rows packed to `max_length` of the student's tokens; everything else follows in the same order."""
    student = rows.select_columns(["input_ids", "labels"])
    student = student.map(lambda row, number: {_ROW: [number] * len(row["input_ids"])}, with_indices=True)
    assert args.max_length is not None, "trl refuses packing without max_length before"
    bins: Any = pack_dataset(student, args.max_length, args.packing_strategy)
    prefixes = teacher_prefixes(rows.column_names)
    read = [f"{prefix}{name}" for prefix in prefixes for name in _COLUMNS]
    teacher = rows.select_columns(read).with_format("numpy")
    others: dict[str, Any] = {name: rows[name][:] for name in rows.column_names if name not in (*_COLUMNS, *read)}

    def with_teacher(row: dict[str, Any]) -> dict[str, Any]:
        starts = np.cumsum([0, *row["seq_lengths"][:-1]])
        members = [row[_ROW][start] for start in starts.tolist()]
        more = {name: [values[member] for member in members] for name, values in others.items()}
        return {**joined_members([teacher[member] for member in members if prefixes], prefixes), **more}

    return bins.map(with_teacher, remove_columns=[_ROW], desc="Packing what belongs to the rows")


def joined_members(members: Sequence[Any], prefixes: Sequence[str] = (TEACHER,)) -> dict[str, Any]:
    """The teachers' sides of the rows that are packed into one, end to end."""
    joined: dict[str, Any] = {}
    for prefix in prefixes:
        for name in _COLUMNS:
            joined[f"{prefix}{name}"] = np.concatenate([member[f"{prefix}{name}"] for member in members])
        joined[f"{prefix}seq_lengths"] = [len(member[f"{prefix}input_ids"]) for member in members]
    return joined


class Read(NamedTuple):
    """Sequences as one side reads them, end to end."""

    ids: Int[np.ndarray, "token"]
    supervised: Bool[np.ndarray, "token"]
    lengths: Int[np.ndarray, "sequence"]

    def first(self, sequences: int) -> "Read":
        """The first of the sequences."""
        tokens = int(self.lengths[:sequences].sum())
        return Read(self.ids[:tokens], self.supervised[:tokens], self.lengths[:sequences])

    def answers(self) -> Int[np.ndarray, "sequence"]:
        """How many times something supervised follows what is not, the unpredictable first token left aside."""
        return np.add.reduceat(self._begins(), self._starts()) if len(self.ids) else np.zeros(len(self.lengths), int)

    def cut_at_answers(self, which: Bool[np.ndarray, "sequence"]) -> "Read":
        """Some of the sequences cut into what precedes the first answer and, from its start on, each answer."""
        begins = self._begins() & np.repeat(which, self.lengths)
        begins[self._starts()] = True
        return self._replace(lengths=np.diff(np.append(np.flatnonzero(begins), len(begins))))

    def _starts(self) -> Int[np.ndarray, "sequence"]:
        return np.cumsum(self.lengths) - self.lengths

    def _begins(self) -> Bool[np.ndarray, "token"]:
        begins = self.supervised.copy()
        begins[1:] &= ~self.supervised[:-1]
        starts = self._starts()
        begins[starts] = False
        begins[starts[self.lengths > 1] + 1] = False
        return begins

    def cover(self, pieces: TokenPieces) -> Tokens:
        """The tokens with the bytes that they stand for."""
        return pieces.cover(self.ids, self.lengths)


def read(sequences: Sequence[tuple[np.ndarray, np.ndarray]]) -> Read:
    """Pairs of (ids, labels) as one; nothing predicts the first token of a sequence."""
    ids, labels = ([np.asarray(pair[side]) for pair in sequences] for side in (0, 1))
    lengths = np.array([len(sequence) for sequence in ids], dtype=np.int64)
    supervised = np.concatenate([*labels, np.zeros(0, np.int64)]) != -100
    supervised[np.cumsum(lengths) - lengths] = False
    return Read(np.concatenate([*ids, np.zeros(0, np.int64)]).astype(np.int64), supervised, lengths)


def read_view(view: View) -> Read:
    """The sequences of a collated batch."""
    ids, labels = view.inputs["input_ids"].numpy(), view.labels.numpy()
    spans = [(row, span) for row in range(len(ids)) for span in spans_of_row(view.inputs, row)]
    return read([(ids[row, span], labels[row, span]) for row, span in spans])


class BatchAligner:
    """Finds the chunks of a batch, joined up to white space where only such chunks should count (`to_space`)."""

    def __init__(self, aligner: Aligner, to_space: bool = False):
        self.aligner, self.to_space = aligner, to_space

    @classmethod
    def of(cls, student: Any, teacher: Any, to_space: bool = False) -> Self:
        """The aligner of two tokenizers or processors."""
        return cls(Aligner.of(_with_template(teacher), _with_template(student)), to_space)

    def chunks(self, student: Read, teacher: Read) -> Chunks:
        """The chunks of the same sequences as both sides read them.

        Where prompts differ (a template written in plain text, say), what is supervised is aligned by itself.
        """
        chunks = self._aligned(student, teacher)
        ours, theirs = student.answers(), teacher.answers()
        apart = (chunks.counts.differing > 0) & (ours == theirs)
        if not apart.any():
            return chunks
        cut = [side.cut_at_answers(apart) for side in (student, teacher)]
        chunks = self._aligned(*cut)
        parts = np.where(apart, ours + 1, 1)
        begins = np.cumsum(parts) - parts
        counts = [np.add.reduceat(getattr(chunks.counts, part.name), begins) for part in fields(RowCounts)]
        return replace(chunks, row=np.repeat(np.arange(len(parts)), parts)[chunks.row], counts=RowCounts(*counts))

    def _aligned(self, student: Read, teacher: Read) -> Chunks:
        aligner = self.aligner
        sides = teacher.cover(aligner.teacher), student.cover(aligner.student)
        return aligner.align(*sides, teacher.supervised, student.supervised)

    def __call__(self, student: Read, teacher: Read) -> ChunkAlignment:
        """The chunks by the supervised tokens that they are made of."""
        chunks = self.chunks(student, teacher)
        row, marker = chunks.row, chunks.marker
        ends = np.ones(len(chunks), dtype=bool)
        if self.to_space:
            ends = chunks.at_boundary.copy()
            ends[:-1] |= row[1:] != row[:-1]
            ends[-1:] = True
        # The chunk that each one becomes part of; one more for tokens in none.
        joined = np.append(np.cumsum(ends) - ends, -1)
        afters = [
            _next_supervised(spans[:, 1][ends], side)
            for spans, side in ((chunks.student, student), (chunks.teacher, teacher))
        ]
        known = (afters[0] >= 0) & (afters[1] >= 0) & ~marker[ends]
        fields = (
            joined[chunks.chunk_of_student_token[student.supervised]],
            joined[chunks.chunk_of_teacher_token[teacher.supervised]],
            *(np.where(known, after, -1) for after in afters),
            row[ends],
        )
        return ChunkAlignment(*(torch.from_numpy(field.astype(np.int64)) for field in fields))


def _with_template(processing_class: Any) -> Any:
    """The tokenizer; that of a processor with the processor's chat template."""
    tokenizer: Any = tokenizer_of(processing_class)
    if tokenizer is not processing_class:
        tokenizer = copy(tokenizer)
        tokenizer.chat_template = processing_class.chat_template
    return tokenizer


def _next_supervised(stops: Int[np.ndarray, "chunk"], side: Read) -> Int[np.ndarray, "chunk"]:
    """The place among the supervised of the token at each stop, -1 if it is of another sequence or not supervised."""
    begins = np.zeros(len(side.ids) + 1, dtype=bool)
    begins[np.cumsum(side.lengths)] = True
    supervised = np.append(side.supervised, False)
    place = np.cumsum(supervised) - 1
    return np.where(supervised[stops] & ~begins[stops], place[stops], -1)


def teacher_sequences(
    rows: Dataset, prefix: str = TEACHER, own: tuple[str, str] | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The (ids, supervised) of every sequence as a teacher reads it; packed rows are taken apart.

    With `own`, a column and a name, only of those that have this name in that column.
    """
    columns = [name for name in rows.column_names if name.startswith(prefix) or (own and name == own[0])]
    for row in rows.select_columns(columns).with_format("numpy"):
        parts = teacher_parts(row, prefix)  # pyright: ignore[reportArgumentType]
        names = [None] * len(parts) if own is None else teacher_names(row, own[0])  # pyright: ignore[reportArgumentType]
        for part, name in zip(parts, names, strict=True):
            if own is None or name == own[1]:
                side = read([(part["input_ids"], part["labels"])])
                yield side.ids, side.supervised


def counts_of(rows: Dataset, align: BatchAligner, prefix: str = TEACHER) -> RowCounts:
    """What becomes of each row of paired data between the student and the teacher of a prefix, which may read none."""
    counts: list[RowCounts] = []
    columns = [f"{side}{name}" for side in ("", prefix) for name in _COLUMNS]
    for batch in rows.select_columns(columns).with_format("numpy").iter(_COUNTED):
        lists: Any = batch
        student, teacher = (
            read(list(zip(lists[f"{side}input_ids"], lists[f"{side}labels"], strict=True))) for side in ("", prefix)
        )
        counts.append(align.chunks(student, teacher).counts)
    return RowCounts(
        *(np.concatenate([getattr(batch_counts, part.name) for batch_counts in counts]) for part in fields(RowCounts))
    )


@dataclass(frozen=True)
class Agreement:
    """How much of some rows both sides agree on; as text, a sentence about it."""

    chunks: int
    share: float
    """Of the student's supervised tokens, those in a chunk."""
    rows: int
    empty: int
    """Rows in which nothing aligns."""
    differing: int
    """Texts between markers that are not the same on both sides."""

    @classmethod
    def of(cls, counts: RowCounts) -> Self:
        aligned, rest = int(counts.student_aligned.sum()), int(counts.student_unaligned.sum())
        empty, differing = int((counts.chunks == 0).sum()), int(counts.differing.sum())
        return cls(int(counts.chunks.sum()), aligned / max(1, aligned + rest), len(counts.chunks), empty, differing)

    def __str__(self) -> str:
        return (
            f"{self.chunks:,} chunks hold {self.share:.1%} of the student's supervised tokens. Rows in which nothing "
            f"aligns: {self.empty} of {self.rows}; texts that differ between the sides: {self.differing}."
        )


def teacher_parts(example: Mapping[str, Any], prefix: str = TEACHER) -> list[dict[str, Any]]:
    """What a teacher's collator takes for one row: its sequences, or the row itself where it has images.

    In the place of a sequence that the teacher does not read stands a token that teaches nothing.
    """
    if f"{prefix}input_ids" not in example:
        return [dict(example)]
    ids, labels = example[f"{prefix}input_ids"], example[f"{prefix}labels"]
    ends = np.cumsum(example.get(f"{prefix}seq_lengths", [len(ids)])).tolist()
    return [
        {"input_ids": ids[start:stop], "labels": labels[start:stop]}
        if stop > start
        else {"input_ids": [0], "labels": [-100]}
        for start, stop in zip([0, *ends], ends, strict=False)
    ]
