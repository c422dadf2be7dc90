"""The chunks that two tokenisations of the same text agree on: the shortest runs of tokens with the same bytes.

Everything works on whole batches: tokens end to end, their cumulative lengths, and a table of the bytes at which the
teacher's tokens end. Where a chunk is one token on both sides, a table made once says whether they are the same bytes;
only those of other chunks are compared. Texts that turn out not to be the same bytes, as one side rewrites them (NFC,
small letters, no accents, fewer spaces) or knows no token for a part, are aligned once more, each for itself, in a
form that neither side rewrites.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Int, Int32
from numpy import ndarray

from .common_runs import common_runs
from .markers import MarkerTable, marker_tables, markers_of, pair_occurrences
from .normal_form import NormalForm
from .pieces import TokenPieces, Tokens, boundary_mask, running, spelling_numbers
from .sides import Side, Spans, records_of, table_of

# What stands for unknown tokens of either side: no byte of UTF-8, and not the same, as their texts may differ.
_UNKNOWN = 0xFE, 0xFF


@dataclass(frozen=True)
class RowCounts:
    """What became of each row; `unaligned` counts supervised tokens that are in no chunk.

    `differing` counts the texts between markers that are not the same on both sides, even in a form that neither of
    them rewrites; what differs in such a text is in no chunk.
    """

    chunks: Int[ndarray, "row"]
    teacher_aligned: Int[ndarray, "row"]
    student_aligned: Int[ndarray, "row"]
    teacher_unaligned: Int[ndarray, "row"]
    student_unaligned: Int[ndarray, "row"]
    differing: Int[ndarray, "row"]


@dataclass(frozen=True)
class Chunks:
    """Chunks in the order of the text: teacher's tokens `teacher[c, 0] : teacher[c, 1]` say what the student's do.

    Positions count tokens of all rows, end to end. `marker` chunks are paired markers (end of turn, say), whose bytes
    differ. `at_boundary` chunks are followed by whitespace or a marker, or on one side by nothing (policy "space"
    merges other chunks with the next). `chunk_of_*_token` is -1 for tokens in none, also for special tokens within a
    chunk.
    """

    teacher: Int[ndarray, "chunk 2"]
    student: Int[ndarray, "chunk 2"]
    row: Int[ndarray, "chunk"]
    marker: Bool[ndarray, "chunk"]
    at_boundary: Bool[ndarray, "chunk"]
    chunk_of_teacher_token: Int32[ndarray, "teacher_token"]
    chunk_of_student_token: Int32[ndarray, "student_token"]
    counts: RowCounts

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True)
class Aligner:
    """Finds the chunks of teacher and student; made once for two tokenizers."""

    teacher: TokenPieces
    student: TokenPieces
    teacher_markers: MarkerTable
    student_markers: MarkerTable

    @classmethod
    def of(cls, teacher: Any, student: Any) -> Self:
        """The aligner of two tokenizers, markers read from their chat templates."""
        pieces = TokenPieces.of(teacher), TokenPieces.of(student)
        return cls(*pieces, *marker_tables(markers_of(teacher), markers_of(student), *pieces))

    @cached_property
    def _tables(self) -> tuple[ndarray, ndarray]:
        spelling = spelling_numbers(self.teacher, self.student)
        opens = boundary_mask(self.teacher), boundary_mask(self.student)
        # A side without spaces calls what follows any sign a word; the other one sees the spaces.
        for own, pieces, other in ((0, self.teacher, self.student), (1, self.student, self.teacher)):
            if pieces.form.spaces and not other.form.spaces:
                opens[own][:] = pieces.special
        return (
            table_of(self.teacher, self.teacher_markers, spelling[0], opens[0]),
            table_of(self.student, self.student_markers, spelling[1], opens[1]),
        )

    @cached_property
    def _form(self) -> NormalForm:
        """What neither side rewrites."""
        return self.teacher.form | self.student.form

    def align(
        self,
        teacher: Tokens,
        student: Tokens,
        teacher_supervised: Bool[ndarray, "teacher_token"] | None = None,
        student_supervised: Bool[ndarray, "student_token"] | None = None,
    ) -> Chunks:
        """The chunks of rows of tokens, row r of the teacher with row r of the student.

        Rows are made of texts between paired markers, and each is aligned for itself: a marker or special token that
        has no partner stands for nothing. Spaces at the start of a text that only one side has (SentencePiece's, or a
        template's) are overlooked; after them bytes are compared, in a form that neither tokenizer rewrites where they
        differ. What differs in that form, too, or is an unknown token on one side, is left out, and what follows is
        paired again.

        With masks of supervised tokens, chunks of texts are kept where all of their tokens are supervised on both
        sides, and markers where some are, which are then their tokens. A first token that nothing predicts must not
        be supervised.
        """
        assert len(teacher.rows) == len(student.rows), "teacher and student have different numbers of rows"
        ours, theirs = self._sides(teacher, student, teacher_supervised, student_supervised)
        segment, closing = _common_ends(ours, theirs)
        spans = ours.spans(closing[0], segment), theirs.spans(closing[1], segment)
        same, differing = _compared(ours, theirs, spans, segment)
        rewritten = np.flatnonzero(differing | ours.has_unknown | theirs.has_unknown)
        if len(rewritten):
            segment, closing, same = _realigned(ours, theirs, self._form, rewritten, segment, closing, same, differing)
            spans = ours.spans(closing[0], segment), theirs.spans(closing[1], segment)
        boundary = ours.at_boundary(spans[0], segment) | theirs.at_boundary(spans[1], segment)
        keep = same & ours.supervised(spans[0], teacher_supervised) & theirs.supervised(spans[1], student_supervised)
        if not keep.all():
            kept = np.flatnonzero(keep)
            spans = spans[0].take(kept), spans[1].take(kept)
            segment, boundary = segment.take(kept), boundary.take(kept)
        row = theirs.rows.take(segment)
        chunk_of = ours.chunk_of(spans[0]), theirs.chunk_of(spans[1])
        aligned = teacher.per_row(chunk_of[0] >= 0), student.per_row(chunk_of[1] >= 0)
        rows = np.arange(len(teacher.rows))
        counts = RowCounts(
            np.diff(np.searchsorted(row, rows)),
            *aligned,
            # Those in chunks are supervised.
            teacher.per_row(teacher_supervised) - aligned[0],
            student.per_row(student_supervised) - aligned[1],
            np.bincount(theirs.rows[differing], minlength=len(rows) - 1),
        )
        return Chunks(
            spans[0].pairs(),
            spans[1].pairs(),
            row,
            theirs.is_marker.take(segment),
            boundary,
            *chunk_of,
            counts,
        )

    def _sides(
        self,
        teacher: Tokens,
        student: Tokens,
        teacher_supervised: Bool[ndarray, "teacher_token"] | None,
        student_supervised: Bool[ndarray, "student_token"] | None,
    ) -> tuple[Side, Side]:
        """Both sides cut into texts between paired markers, without the spaces that only one of them starts with."""
        records = records_of(self._tables[0], teacher), records_of(self._tables[1], student)
        markers = (
            self.teacher_markers.find(teacher, np.flatnonzero(records[0]["marks"])),
            self.student_markers.find(student, np.flatnonzero(records[1]["marks"])),
        )
        partners = pair_occurrences(*markers, teacher, student)
        ours = Side.of(teacher, records[0], markers[0], partners[0], teacher_supervised)
        theirs = Side.of(student, records[1], markers[1], partners[1], student_supervised)
        spaces = ours.leading_spaces() - theirs.leading_spaces()
        return ours.without_spaces(spaces), theirs.without_spaces(-spaces)


def _common_ends(
    ours: Side, theirs: Side
) -> tuple[Int[ndarray, "chunk"], tuple[Int[ndarray, "chunk"], Int[ndarray, "chunk"]]]:
    """Where tokens of both sides end at the same byte: its segment, and the token of each side."""
    room = np.maximum(ours.sizes, theirs.sizes)
    begins = running(room)
    ends: list[ndarray] = []
    for side in (ours, theirs):
        shift = begins[:-1] - side.ends[side.bounds[:-1]]
        end = side.ends[1:] + np.repeat(shift, np.diff(side.bounds))
        # A token without bytes ends where the one before it does: the last place below is for all of them.
        end[side.blank] = -1
        ends.append(end)
    token_at = np.full(begins[-1] + 2, -1, np.int32)
    token_at[ends[0]] = np.arange(len(ends[0]), dtype=np.int32)
    token_at[-1] = -1
    partners = token_at.take(ends[1], mode="wrap")
    closing = np.flatnonzero(partners >= 0)
    counts = np.diff(np.searchsorted(ends[1].take(closing), begins, "right"))
    return np.repeat(np.arange(len(room)), counts), (partners.take(closing), closing)


def _compared(
    ours: Side, theirs: Side, spans: tuple[Spans, Spans], segment: Int[ndarray, "chunk"]
) -> tuple[Bool[ndarray, "chunk"], Bool[ndarray, "segment"]]:
    """Which chunks no difference precedes in their segment, and which segments have one as far as both sides go."""
    (starts, stops), (other_starts, other_stops) = spans
    spelling = ours.records["spelling"][starts]
    sure = (spelling == theirs.records["spelling"][other_starts]) & (spelling >= 0)
    sure &= stops - starts + other_stops - other_starts == 2
    unsure = np.flatnonzero(~sure)
    # After the last chunk of a segment there may be bytes on both sides, where one is cut or they differ.
    edges = np.searchsorted(segment, np.arange(len(ours.rows) + 1))
    rests = ours.rests(spans[0], edges), theirs.rests(spans[1], edges)
    left = np.minimum(ours.sizes_of(rests[0]), theirs.sizes_of(rests[1]))
    open_ = np.flatnonzero(left)
    counts = np.concatenate([ours.sizes_of(spans[0].take(unsure)), left[open_]])
    data = [
        side.data(Spans(*map(np.concatenate, zip(own.take(unsure), rest.take(open_), strict=True))), counts)
        for side, own, rest in zip((ours, theirs), spans, rests, strict=True)
    ]
    differing = np.zeros(len(ours.rows), bool)
    same = np.ones(len(segment), bool)
    if len(differences := np.flatnonzero(data[0] != data[1])):
        runs = np.unique(np.searchsorted(np.cumsum(counts), differences, "right"))
        differing[np.concatenate([segment[unsure], open_])[runs]] = True
        first = edges[1:].copy()
        wrong = unsure[runs[runs < len(unsure)]]
        np.minimum.at(first, segment[wrong], wrong)
        same = np.arange(len(segment)) < first.take(segment)
    return same, differing


def _realigned(
    ours: Side,
    theirs: Side,
    form: NormalForm,
    rewritten: Int[ndarray, "rewritten"],
    segment: Int[ndarray, "chunk"],
    closing: tuple[Int[ndarray, "chunk"], Int[ndarray, "chunk"]],
    same: Bool[ndarray, "chunk"],
    differing: Bool[ndarray, "segment"],
) -> tuple[Int[ndarray, "chunk"], tuple[ndarray, ndarray], Bool[ndarray, "chunk"]]:
    """The same chunks, those of `rewritten` segments found anew; marks in `differing` which of these still differ."""
    kept = ~np.isin(segment, rewritten)
    parts = [(segment[kept], closing[0][kept], closing[1][kept], same[kept])]
    for number in rewritten.tolist():
        first, second, alike, differing[number] = _ends_in_form(ours, theirs, form, number)
        parts.append((np.full(len(first), number), first, second, alike))
    segment, first, second, same = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.argsort(segment, kind="stable")
    return segment[order], (first[order], second[order]), same[order]


def _ends_in_form(
    ours: Side, theirs: Side, form: NormalForm, segment: int
) -> tuple[Int[ndarray, "chunk"], Int[ndarray, "chunk"], Bool[ndarray, "chunk"], bool]:
    """Where chunks of a segment may end on both sides, which of them are the same text, and whether anything differs.

    A chunk that is not the same text takes in what differs before the next one begins.
    """
    texts: list[ndarray] = []
    tokens: list[ndarray] = []
    ends: list[ndarray] = []
    for side, unknown in zip((ours, theirs), _UNKNOWN, strict=True):
        data, stops = side.covered(segment, unknown)
        text, places = form.fold(data)
        end = places[stops]
        # Tokens of which nothing is left (a space, say) belong to those after them.
        adding = np.flatnonzero(end > np.maximum.accumulate(np.append(0, end))[:-1])
        texts.append(text)
        tokens.append(side.bounds[segment] + adding)
        ends.append(end[adding])
    runs = common_runs(texts[0], texts[1], _UNKNOWN)
    chosen, same = [np.zeros((2, 0), np.int64)], [np.zeros(0, bool)]
    for *starts, length in runs:
        inside = [
            np.flatnonzero((end >= start) & (end <= start + length)) for end, start in zip(ends, starts, strict=True)
        ]
        _, *which = np.intersect1d(
            *(end[own] - start for end, own, start in zip(ends, inside, starts, strict=True)),
            assume_unique=True,
            return_indices=True,
        )
        chosen.append(np.stack([inside[0][which[0]], inside[1][which[1]]]))
        alike = np.ones(len(which[0]), bool)
        # Before the first end in a run something differs, unless the texts begin with it.
        alike[:1] = starts == [0, 0]
        same.append(alike)
    pairs = np.concatenate(chosen, 1)
    whole = runs[0][2] if len(runs) == 1 and runs[0][:2] == (0, 0) else 0
    return tokens[0][pairs[0]], tokens[1][pairs[1]], np.concatenate(same), whole < min(map(len, texts))
