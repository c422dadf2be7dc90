"""The chunks that two tokenisations of the same text agree on: the shortest runs of tokens with the same bytes.

All steps work on whole batches: tokens end to end, their cumulative lengths, and a table of the bytes at which the
teacher's tokens end. If a chunk is one token on both sides, a table that is made once tells whether the bytes are
equal; only the bytes of other chunks are compared. The bytes of a text differ if one side rewrites it (NFC, small
letters, no accents, fewer spaces) or has no token for a part of it. Such texts are aligned once more, one by one, in a
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
from .sides import SegmentedTokens, Spans, records_of, table_of

# The bytes for unknown tokens of teacher and student. They do not occur in UTF-8, and they are not equal, because the
# texts of two unknown tokens may differ.
_UNKNOWN = 0xFE, 0xFF


@dataclass(frozen=True)
class RowCounts:
    """The numbers of chunks and tokens in each row; `unaligned` counts supervised tokens that are in no chunk.

    `differing` counts the texts between markers that differ between the sides even in a form that neither of them
    rewrites; the differing parts of such a text are in no chunk.
    """

    chunks: Int[ndarray, "row"]
    teacher_aligned: Int[ndarray, "row"]
    student_aligned: Int[ndarray, "row"]
    teacher_unaligned: Int[ndarray, "row"]
    student_unaligned: Int[ndarray, "row"]
    differing: Int[ndarray, "row"]


@dataclass(frozen=True)
class Chunks:
    """Chunks in the order of the text: tokens `teacher[c, 0] : teacher[c, 1]` and the same of `student` are one text.

    Positions count tokens of all rows, end to end. `marker` chunks are paired markers (an end of turn, for example),
    whose bytes differ. `at_boundary` chunks are followed by whitespace or a marker, or on one side by nothing (policy
    "space" merges other chunks with the next). `chunk_of_*_token` is -1 for tokens in no chunk, and for special tokens
    within a chunk.
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
        # A tokenizer that drops spaces marks a new word after every punctuation sign. Only the other side sees whether
        # there was a space, so that its tokens alone decide.
        for own, pieces, other in ((0, self.teacher, self.student), (1, self.student, self.teacher)):
            if pieces.form.spaces and not other.form.spaces:
                opens[own][:] = pieces.special
        return (
            table_of(self.teacher, self.teacher_markers, spelling[0], opens[0]),
            table_of(self.student, self.student_markers, spelling[1], opens[1]),
        )

    @cached_property
    def _form(self) -> NormalForm:
        """The form that neither side rewrites."""
        return self.teacher.form | self.student.form

    def align(
        self,
        teacher: Tokens,
        student: Tokens,
        teacher_supervised: Bool[ndarray, "teacher_token"] | None = None,
        student_supervised: Bool[ndarray, "student_token"] | None = None,
    ) -> Chunks:
        """The chunks of rows of tokens, row r of the teacher with row r of the student.

        A row consists of texts between paired markers, and each text is aligned separately. A marker or special token
        without a partner counts as empty. Spaces at the start of a text that only one side has (from SentencePiece or
        a template) are ignored. The bytes after them are compared; where they differ, in the form that neither
        tokenizer rewrites. Parts that differ in that form too, and parts that are an unknown token on one side, are
        left out, and pairing continues after them.

        With masks of supervised tokens, a chunk of text is kept if all its tokens are supervised on both sides. A
        marker is kept if some of its tokens are supervised, and then consists of these. The first token of a row,
        which nothing predicts, must not be supervised.
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
            # Tokens in chunks are supervised, so that the difference is the number of supervised tokens in none.
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
    ) -> tuple[SegmentedTokens, SegmentedTokens]:
        """Both sides in texts between paired markers, without leading spaces that only one of them has."""
        records = records_of(self._tables[0], teacher), records_of(self._tables[1], student)
        markers = (
            self.teacher_markers.find(teacher, np.flatnonzero(records[0]["marks"])),
            self.student_markers.find(student, np.flatnonzero(records[1]["marks"])),
        )
        partners = pair_occurrences(*markers, teacher, student)
        ours = SegmentedTokens.of(teacher, records[0], markers[0], partners[0], teacher_supervised)
        theirs = SegmentedTokens.of(student, records[1], markers[1], partners[1], student_supervised)
        spaces = ours.leading_spaces() - theirs.leading_spaces()
        return ours.without_spaces(spaces), theirs.without_spaces(-spaces)


def _common_ends(
    ours: SegmentedTokens, theirs: SegmentedTokens
) -> tuple[Int[ndarray, "chunk"], tuple[Int[ndarray, "chunk"], Int[ndarray, "chunk"]]]:
    """The tokens of both sides that end at the same byte: the segment, and the token of each side."""
    room = np.maximum(ours.sizes, theirs.sizes)
    # Segment s may use the places from begins[s] on, enough for the longer side: ends in different segments never
    # meet.
    begins = running(room)
    ends: list[ndarray] = []
    for side in (ours, theirs):
        shift = begins[:-1] - side.ends[side.bounds[:-1]]
        end = side.ends[1:] + np.repeat(shift, np.diff(side.bounds))
        # A token without bytes ends where the token before it does and closes no chunk: index -1, the last place of
        # the table below, is reserved for such tokens.
        end[side.blank] = -1
        ends.append(end)
    token_at = np.full(begins[-1] + 2, -1, np.int32)
    token_at[ends[0]] = np.arange(len(ends[0]), dtype=np.int32)
    token_at[-1] = -1
    partners: ndarray = token_at.take(ends[1], mode="wrap")
    closing = np.flatnonzero(partners >= 0)
    counts = np.diff(np.searchsorted(ends[1].take(closing), begins, "right"))
    return np.repeat(np.arange(len(room)), counts), (partners.take(closing), closing)


def _compared(
    ours: SegmentedTokens, theirs: SegmentedTokens, spans: tuple[Spans, Spans], segment: Int[ndarray, "chunk"]
) -> tuple[Bool[ndarray, "chunk"], Bool[ndarray, "segment"]]:
    """The chunks without a difference before them in their segment, and the segments with a difference.

    A segment is compared up to the end of its shorter side.
    """
    (starts, stops), (other_starts, other_stops) = spans
    spelling = ours.records["spelling"][starts]
    sure = (spelling == theirs.records["spelling"][other_starts]) & (spelling >= 0)
    sure &= stops - starts + other_stops - other_starts == 2
    unsure = np.flatnonzero(~sure)
    # After the last chunk of a segment both sides may have bytes left, if one is truncated or they differ.
    edges = np.searchsorted(segment, np.arange(len(ours.rows) + 1))
    rests = ours.rests(spans[0], edges), theirs.rests(spans[1], edges)
    left = np.minimum(ours.sizes_of(rests[0]), theirs.sizes_of(rests[1]))
    open_ = np.flatnonzero(left)
    counts = np.concatenate([ours.sizes_of(spans[0].take(unsure)), left[open_]])
    data = [
        side.data(Spans(*map(np.concatenate, zip(span.take(unsure), rest.take(open_), strict=True))), counts)
        for side, span, rest in zip((ours, theirs), spans, rests, strict=True)
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
    ours: SegmentedTokens,
    theirs: SegmentedTokens,
    form: NormalForm,
    rewritten: Int[ndarray, "rewritten"],
    segment: Int[ndarray, "chunk"],
    closing: tuple[Int[ndarray, "chunk"], Int[ndarray, "chunk"]],
    same: Bool[ndarray, "chunk"],
    differing: Bool[ndarray, "segment"],
) -> tuple[Int[ndarray, "chunk"], tuple[ndarray, ndarray], Bool[ndarray, "chunk"]]:
    """The same chunks, but those of `rewritten` segments aligned again; updates `differing` for these segments."""
    kept = ~np.isin(segment, rewritten)
    parts = [(segment[kept], closing[0][kept], closing[1][kept], same[kept])]
    for number in rewritten.tolist():
        first, second, alike, differing[number] = _ends_in_form(ours, theirs, form, number)
        parts.append((np.full(len(first), number), first, second, alike))
    segment, first, second, same = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.argsort(segment, kind="stable")
    return segment[order], (first[order], second[order]), same[order]


def _ends_in_form(
    ours: SegmentedTokens, theirs: SegmentedTokens, form: NormalForm, segment: int
) -> tuple[Int[ndarray, "chunk"], Int[ndarray, "chunk"], Bool[ndarray, "chunk"], bool]:
    """Where chunks of a segment may end on both sides, which of them are the same text, and whether anything differs.

    A chunk that is not the same text covers a difference up to the start of the next chunk.
    """
    texts: list[ndarray] = []
    tokens: list[ndarray] = []
    ends: list[ndarray] = []
    for side, unknown in zip((ours, theirs), _UNKNOWN, strict=True):
        data, stops = side.covered(segment, unknown)
        text, places = form.fold(data)
        end = places[stops]
        # Tokens that the form removes wholly (a space, for example) belong to the tokens after them.
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
        first, second = (end[within] - start for end, within, start in zip(ends, inside, starts, strict=True))
        which = np.intersect1d(first, second, assume_unique=True, return_indices=True)[1:]
        chosen.append(np.stack([inside[0][which[0]], inside[1][which[1]]]))
        alike = np.ones(len(which[0]), bool)
        # The chunk that ends first in a run covers the difference before it, unless the run begins both texts.
        alike[:1] = starts == [0, 0]
        same.append(alike)
    pairs = np.concatenate(chosen, 1)
    whole = runs[0][2] if len(runs) == 1 and runs[0][:2] == (0, 0) else 0
    return tokens[0][pairs[0]], tokens[1][pairs[1]], np.concatenate(same), whole < min(map(len, texts))
