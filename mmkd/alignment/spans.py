"""The chunks that two tokenisations of the same text agree on: the shortest runs of tokens with the same bytes.

Everything works on whole batches: tokens end to end, cumulative bytes, one bitmap of the bytes where tokens end.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Int, Int32, UInt8
from numpy import ndarray

from mmkd.alignment.markers import MarkerTable, Occurrences, marker_tables, markers_of, pair_occurrences
from mmkd.alignment.pieces import BOUNDARY_BYTES, TokenPieces, Tokens, ragged_ranges


@dataclass(frozen=True)
class RowCounts:
    """What became of each row; `unaligned` counts supervised tokens that are in no chunk.

    `differing` counts the texts between markers whose bytes are not the same on both sides; what follows the first
    difference in such a text is in no chunk.
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
    differ. `at_boundary` chunks are followed by whitespace, a marker or nothing on both sides (policy "space" merges
    other chunks with the next). `chunk_of_*_token` is -1 for tokens in none, special tokens within a chunk included.
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
        template's) are overlooked; after them bytes are compared, and nothing is paired beyond a difference.

        With masks of supervised tokens, chunks of texts are kept where all of their tokens are supervised on both
        sides, and markers where some are, which are then their tokens. A first token that nothing predicts must not
        be supervised.
        """
        assert len(teacher.rows) == len(student.rows), "teacher and student have different numbers of rows"
        found = self.teacher_markers.find(teacher), self.student_markers.find(student)
        partners = pair_occurrences(*found, teacher, student)
        ours = _Side.of(teacher, found[0], partners[0], teacher_supervised)
        theirs = _Side.of(student, found[1], partners[1], student_supervised)
        spaces = ours.leading_spaces() - theirs.leading_spaces()
        ours, theirs = ours.without_spaces(spaces), theirs.without_spaces(-spaces)
        agreeing = _agreeing_bytes(ours, theirs)
        segment, place, closers = _common_ends(ours, theirs, agreeing)
        spans = ours.spans(closers[0], segment), theirs.spans(closers[1], segment)
        boundary = ours.at_boundary(segment, place) | theirs.at_boundary(segment, place)
        keep = ours.supervised(spans[0], teacher_supervised) & theirs.supervised(spans[1], student_supervised)
        if not keep.all():
            kept = np.flatnonzero(keep)
            spans = spans[0].take(kept, 0), spans[1].take(kept, 0)
            segment, boundary = segment[kept], boundary[kept]
        row = theirs.rows[segment]
        chunk_of = ours.chunk_of(spans[0]), theirs.chunk_of(spans[1])
        differing = agreeing < np.minimum(ours.sizes, theirs.sizes)
        counts = RowCounts(
            np.bincount(row, minlength=len(teacher.rows) - 1),
            ours.per_row(chunk_of[0] >= 0),
            theirs.per_row(chunk_of[1] >= 0),
            ours.per_row(_unaligned(chunk_of[0], teacher_supervised)),
            theirs.per_row(_unaligned(chunk_of[1], student_supervised)),
            np.bincount(theirs.rows[differing], minlength=len(teacher.rows) - 1),
        )
        return Chunks(*spans, row, theirs.is_marker[segment], boundary, *chunk_of, counts)


@dataclass(frozen=True)
class _Side:
    """One side's tokens in segments: in every row a text, a paired marker, a text and so on up to a last text.

    Both sides have the same segments. A marker is one byte long, on its last token, and has the byte zero. `skipped`
    tokens belong to no chunk; other ones without bytes (a part of a character) belong to that of the bytes after them.
    """

    tokens: Tokens
    lengths: Int[ndarray, "token"]
    skipped: Bool[ndarray, "token"]
    data: UInt8[ndarray, "byte"]
    ends: Int[ndarray, "token+1"]
    bounds: Int[ndarray, "segment+1"]
    rows: Int[ndarray, "segment"]
    is_marker: Bool[ndarray, "segment"]

    @classmethod
    def of(
        cls,
        tokens: Tokens,
        found: Occurrences,
        partners: Int[ndarray, "pair"],
        supervised: Bool[ndarray, "token"] | None,
    ) -> Self:
        """The tokens divided at those markers that have partners; other ones that no text spells are skipped."""
        starts, lengths = tokens.starts.copy(), tokens.lengths.copy()
        skipped = tokens.special.copy()
        alone = np.ones(len(found.starts), bool)
        alone[partners] = False
        members = found[alone & found.hard].tokens()
        lengths[members], skipped[members] = 0, True
        paired = found[partners]
        members, last = paired.tokens(), paired.stops - 1
        lengths[members], skipped[members] = 0, False
        if supervised is not None:
            # Half of a marker may be supervised: the end of a turn, but not the newline after it.
            sizes = paired.stops - paired.starts
            taught = np.where(supervised[members], members, -1)
            latest = np.maximum.reduceat(taught, np.cumsum(sizes) - sizes) if len(sizes) else last
            skipped[members] = (taught < 0) & np.repeat(latest >= 0, sizes)
            last = np.where(latest >= 0, latest, last)
        starts[last], lengths[last] = len(tokens.data) - 1, 1
        count = len(tokens.rows) - 1
        numbers = 2 * np.arange(len(partners)) + paired.rows
        bounds = np.empty(2 * len(partners) + count + 1, np.int64)
        bounds[2 * np.searchsorted(paired.rows, np.arange(count + 1)) + np.arange(count + 1)] = tokens.rows
        bounds[numbers + 1], bounds[numbers + 2] = paired.starts, paired.stops
        is_marker = np.zeros(len(bounds) - 1, bool)
        is_marker[numbers + 1] = True
        rows = np.repeat(np.arange(count), 2 * np.bincount(paired.rows, minlength=count) + 1)
        data = tokens.data.take(ragged_ranges(starts, lengths))
        return cls(tokens, lengths, skipped, data, _running(lengths), bounds, rows, is_marker)

    @cached_property
    def sizes(self) -> Int[ndarray, "segment"]:
        """The bytes in each segment."""
        return np.diff(self.ends[self.bounds])

    def leading_spaces(self) -> Int[ndarray, "segment"]:
        """How many spaces each segment begins with."""
        begins, sizes = self.ends[self.bounds[:-1]], self.sizes
        spaces = np.zeros(len(sizes), np.int64)
        open_ = np.flatnonzero(sizes)
        while len(open_):
            open_ = open_[self.data[begins[open_] + spaces[open_]] == 32]
            spaces[open_] += 1
            open_ = open_[spaces[open_] < sizes[open_]]
        return spaces

    def without_spaces(self, counts: Int[ndarray, "segment"]) -> Self:
        """The same without the first so many bytes (none if negative) of each segment."""
        if not (counts > 0).any():
            return self
        dropped = ragged_ranges(self.ends[self.bounds[:-1]], np.maximum(counts, 0))
        lengths = self.lengths.copy()
        np.subtract.at(lengths, np.searchsorted(self.ends, dropped, "right") - 1, 1)
        return replace(self, lengths=lengths, ends=_running(lengths), data=np.delete(self.data, dropped))

    def at_boundary(self, segment: Int[ndarray, "chunk"], place: Int[ndarray, "chunk"]) -> Bool[ndarray, "chunk"]:
        """Whether whitespace or nothing follows the byte at which a chunk ends, counted from the segment's start."""
        last = place == self.sizes[segment]
        after = np.where(last, 0, self.ends[self.bounds[segment]] + place)
        return last | _IS_BOUNDARY[self.data[after]]

    def spans(self, closers: Int[ndarray, "chunk"], segment: Int[ndarray, "chunk"]) -> Int[ndarray, "chunk 2"]:
        """The chunks that end with these tokens, from the first token that belongs to them."""
        starts = np.maximum(np.concatenate([[0], closers[:-1] + 1]), self.bounds[segment]) if len(closers) else closers
        while (outside := self.skipped[starts]).any():
            starts = starts + outside
        return np.stack([starts, closers + 1], -1)

    def supervised(
        self, spans: Int[ndarray, "chunk 2"], supervised: Bool[ndarray, "token"] | None
    ) -> Bool[ndarray, "chunk"]:
        """Whether all tokens of a chunk are supervised."""
        if supervised is None:
            return np.ones(len(spans), bool)
        lacking = _running(~(supervised | self.skipped))
        return lacking[spans[:, 1]] == lacking[spans[:, 0]]

    def chunk_of(self, spans: Int[ndarray, "chunk 2"]) -> Int32[ndarray, "token"]:
        """The number of every token's chunk, or -1."""
        numbers = np.full((len(spans) + 1, 2), -1, np.int32)
        numbers[:-1, 1] = np.arange(len(spans))
        edges = np.concatenate([[0], spans.ravel(), np.repeat(len(self.skipped), 2)])
        chunk_of = np.repeat(numbers.ravel(), np.diff(edges))
        chunk_of[self.skipped] = -1
        return chunk_of

    def per_row(self, flags: Bool[ndarray, "token"]) -> Int[ndarray, "row"]:
        """How many tokens of each row have the flag."""
        return np.diff(_running(flags)[self.tokens.rows])


_IS_BOUNDARY = np.isin(np.arange(256), np.frombuffer(BOUNDARY_BYTES, np.uint8))


def _running(values: ndarray) -> Int[ndarray, "item+1"]:
    """Sums of the first 0, 1, ... values."""
    sums = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=sums[1:])
    return sums


def _unaligned(chunk_of: Int32[ndarray, "token"], supervised: Bool[ndarray, "token"] | None) -> Bool[ndarray, "token"]:
    return chunk_of < 0 if supervised is None else supervised & (chunk_of < 0)


def _agreeing_bytes(ours: _Side, theirs: _Side) -> Int[ndarray, "segment"]:
    """For every segment, how many bytes from its start on are the same on both sides."""
    agreeing = np.minimum(ours.sizes, theirs.sizes)
    data, other_data = ours.data, theirs.data
    if not np.array_equal(ours.sizes, theirs.sizes):
        data = data[ragged_ranges(ours.ends[ours.bounds[:-1]], agreeing)]
        other_data = other_data[ragged_ranges(theirs.ends[theirs.bounds[:-1]], agreeing)]
    differences = np.flatnonzero(data != other_data)
    if len(differences):
        begins = np.cumsum(agreeing) - agreeing
        segments, first = np.unique(np.searchsorted(begins, differences, "right") - 1, return_index=True)
        agreeing[segments] = differences[first] - begins[segments]
    return agreeing


def _common_ends(
    ours: _Side, theirs: _Side, agreeing: Int[ndarray, "segment"]
) -> tuple[Int[ndarray, "chunk"], Int[ndarray, "chunk"], tuple[Int[ndarray, "chunk"], Int[ndarray, "chunk"]]]:
    """Where tokens of both sides end at the same byte: its segment, its place in there, and the token of each side."""
    room = np.maximum(ours.sizes, theirs.sizes)
    begins = np.cumsum(room) - room
    tokens, keys = [], []
    for side in (ours, theirs):
        shift = begins - side.ends[side.bounds[:-1]]
        key = side.ends[1:] + np.repeat(shift, np.diff(side.bounds))
        # A token without bytes ends where the one before it does.
        covering = np.flatnonzero(side.lengths > 0)
        tokens.append(covering)
        keys.append(key[covering])
    ends_here = np.zeros((2, int(room.sum()) + 1), bool)
    ends_here[0][keys[0]] = True
    ends_here[1][keys[1]] = True
    common = ends_here[0] & ends_here[1]
    for segment in np.flatnonzero(agreeing < np.minimum(ours.sizes, theirs.sizes)).tolist():
        common[begins[segment] + agreeing[segment] + 1 : begins[segment] + room[segment] + 1] = False
    closers = tokens[0][common[keys[0]]], tokens[1][common[keys[1]]]
    ends = np.flatnonzero(common)
    segment = np.repeat(np.arange(len(room)), np.diff(np.searchsorted(ends, np.append(begins, len(common)), "right")))
    return segment, ends - begins[segment], closers
