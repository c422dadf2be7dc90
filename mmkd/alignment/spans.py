"""The chunks that two tokenisations of the same text agree on: the shortest runs of tokens with the same bytes.

Everything works on whole batches: tokens end to end, their cumulative lengths, and a table of the bytes at which the
teacher's tokens end. Where a chunk is one token on both sides, a table made once says whether they are the same bytes;
only those of other chunks are compared.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
from jaxtyping import Bool, Int, Int32, UInt8
from numpy import ndarray

from mmkd.alignment.markers import MarkerTable, Occurrences, marker_tables, markers_of, pair_occurrences
from mmkd.alignment.pieces import (
    BOUNDARY_BYTES,
    TokenPieces,
    Tokens,
    boundary_mask,
    ragged_ranges,
    running,
    spelling_numbers,
)


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
        return (
            _table(self.teacher, self.teacher_markers, spelling[0]),
            _table(self.student, self.student_markers, spelling[1]),
        )

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
        records = _records(self._tables[0], teacher), _records(self._tables[1], student)
        found = (
            self.teacher_markers.find(teacher, np.flatnonzero(records[0]["marks"])),
            self.student_markers.find(student, np.flatnonzero(records[1]["marks"])),
        )
        partners = pair_occurrences(*found, teacher, student)
        ours = _Side.of(teacher, records[0], found[0], partners[0], teacher_supervised)
        theirs = _Side.of(student, records[1], found[1], partners[1], student_supervised)
        spaces = ours.leading_spaces() - theirs.leading_spaces()
        ours, theirs = ours.without_spaces(spaces), theirs.without_spaces(-spaces)
        segment, closing = _common_ends(ours, theirs)
        spans = ours.spans(closing[0], segment), theirs.spans(closing[1], segment)
        boundary = ours.at_boundary(spans[0], segment) | theirs.at_boundary(spans[1], segment)
        same, differing = _compared(ours, theirs, spans, segment)
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


class _Spans(NamedTuple):
    """Runs of tokens, from the first up to the one after the last."""

    starts: Int[ndarray, "chunk"]
    stops: Int[ndarray, "chunk"]

    def take(self, which: Int[ndarray, "kept"]) -> "_Spans":
        return _Spans(self.starts.take(which), self.stops.take(which))

    def pairs(self) -> Int[ndarray, "chunk 2"]:
        pairs = np.empty((len(self.starts), 2), np.int64)
        pairs[:, 0], pairs[:, 1] = self
        return pairs


# What is known of a token, together: looking it up waits for memory once.
_RECORD = np.dtype(
    [
        ("start", np.int32),
        ("length", np.int32),
        # Tokens with the same number have the same bytes; -1 says nothing.
        ("spelling", np.int32),
        # In no chunk: a special token that is not part of a paired marker.
        ("skipped", bool),
        # Begins with what is a boundary.
        ("opens", bool),
        # May be the first token of a marker.
        ("marks", bool),
    ],
    align=True,
)
_IS_BOUNDARY = np.isin(np.arange(256), np.frombuffer(BOUNDARY_BYTES, np.uint8))


def _table(pieces: TokenPieces, markers: MarkerTable, spelling: Int32[ndarray, "vocab"]) -> ndarray:
    """The records of a vocabulary."""
    table = np.zeros(len(pieces), _RECORD)
    table["start"], table["length"], table["spelling"] = pieces.starts, pieces.lengths, spelling
    table["skipped"], table["opens"], table["marks"] = pieces.special, boundary_mask(pieces), markers.begins
    return table


def _records(table: ndarray, tokens: Tokens) -> ndarray:
    """The records of tokens, where they are placed in a text with what they cover there."""
    records = table.take(tokens.ids)
    if tokens.placed:
        records["start"], records["length"], data = tokens.placed
        records["spelling"], records["opens"] = -1, _IS_BOUNDARY[data[tokens.placed[0]]]
    return records


@dataclass(frozen=True)
class _Side:
    """One side's tokens in segments: in every row a text, a paired marker, a text and so on up to a last text.

    Both sides have the same segments. A marker is one byte long, on its last token, and has the byte zero. `skipped`
    tokens belong to no chunk; other ones without bytes (a part of a character) belong to that of the bytes after them.
    """

    text: UInt8[ndarray, "byte"]
    records: ndarray
    bounds: Int[ndarray, "segment+1"]
    rows: Int[ndarray, "segment"]
    is_marker: Bool[ndarray, "segment"]

    @classmethod
    def of(
        cls,
        tokens: Tokens,
        records: ndarray,
        found: Occurrences,
        partners: Int[ndarray, "pair"],
        supervised: Bool[ndarray, "token"] | None,
    ) -> Self:
        """The tokens divided at those markers that have partners; other ones that no text spells are skipped."""
        count = len(tokens.rows) - 1
        if not len(found.starts):
            return cls(tokens.data, records, tokens.rows, np.arange(count), np.zeros(count, bool))
        lengths, skipped = records["length"], records["skipped"]
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
        lengths[last], records["start"][last], records["spelling"][last] = 1, len(tokens.data) - 1, -1
        numbers = 2 * np.arange(len(partners)) + paired.rows
        bounds = np.empty(2 * len(partners) + count + 1, np.int64)
        bounds[2 * np.searchsorted(paired.rows, np.arange(count + 1)) + np.arange(count + 1)] = tokens.rows
        bounds[numbers + 1], bounds[numbers + 2] = paired.starts, paired.stops
        is_marker = np.zeros(len(bounds) - 1, bool)
        is_marker[numbers + 1] = True
        rows = np.repeat(np.arange(count), 2 * np.bincount(paired.rows, minlength=count) + 1)
        return cls(tokens.data, records, bounds, rows, is_marker)

    @cached_property
    def ends(self) -> Int[ndarray, "token+1"]:
        """The bytes before each token, and at last all of them."""
        return running(self.records["length"])

    @cached_property
    def sizes(self) -> Int[ndarray, "segment"]:
        """The bytes in each segment."""
        return np.diff(self.ends[self.bounds])

    @cached_property
    def blank(self) -> Bool[ndarray, "token"]:
        """The tokens without bytes."""
        return self.records["length"] == 0

    def leading_spaces(self) -> Int[ndarray, "segment"]:
        """How many spaces each segment begins with."""
        begins, stops = self.ends[self.bounds[:-1]], self.ends[self.bounds[1:]]
        spaces = np.zeros(len(begins), np.int64)
        open_, width = np.flatnonzero(begins < stops), 1
        while len(open_):
            places = (begins[open_] + spaces[open_])[:, None] + np.arange(width)
            inside = places < stops[open_, None]
            tokens = np.searchsorted(self.ends[:-1], places, "right") - 1
            data = self.text.take(self.records["start"][tokens] + places - self.ends[tokens], mode="clip")
            run = np.logical_and.accumulate(inside & (data == ord(" ")), 1).sum(1)
            spaces[open_] += run
            open_, width = open_[run == width], 32 * width
        return spaces

    def without_spaces(self, counts: Int[ndarray, "segment"]) -> Self:
        """The same without the first so many bytes (none if negative) of each segment."""
        if not (counts > 0).any():
            return self
        dropped = ragged_ranges(self.ends[self.bounds[:-1]], np.maximum(counts, 0))
        tokens = np.searchsorted(self.ends, dropped, "right") - 1
        records = self.records.copy()
        np.add.at(records["start"], tokens, 1)
        np.subtract.at(records["length"], tokens, 1)
        records["spelling"][tokens] = -1
        return replace(self, records=records)

    def spans(self, closing: Int[ndarray, "chunk"], segment: Int[ndarray, "chunk"]) -> _Spans:
        """The chunks that end with these tokens, from the first token that belongs to them."""
        stops = closing + 1
        starts = self.bounds.take(segment)
        np.maximum(starts[1:], stops[:-1], out=starts[1:])
        while (outside := self.records["skipped"][starts]).any():
            starts += outside
        return _Spans(starts, stops)

    def at_boundary(self, spans: _Spans, segment: Int[ndarray, "chunk"]) -> Bool[ndarray, "chunk"]:
        """Whether whitespace or nothing follows a chunk in its segment."""
        after, last = spans.stops, self.bounds[1:].take(segment)
        # Tokens without bytes are passed over.
        while (passed := (after < last) & self.blank.take(after, mode="clip")).any():
            after = after + passed
        return (after >= last) | self.records["opens"].take(after, mode="clip")

    def rests(self, spans: _Spans, edges: Int[ndarray, "segment+1"]) -> _Spans:
        """The tokens of each segment that follow its last span; those of segment s are `edges[s] : edges[s + 1]`."""
        starts = self.bounds[:-1].copy()
        some = np.flatnonzero(np.diff(edges))
        starts[some] = spans.stops[edges[some + 1] - 1]
        return _Spans(starts, self.bounds[1:])

    def sizes_of(self, spans: _Spans) -> Int[ndarray, "span"]:
        """The bytes in each span."""
        return self.ends[spans.stops] - self.ends[spans.starts]

    def data(self, spans: _Spans, counts: Int[ndarray, "span"]) -> UInt8[ndarray, "byte"]:
        """The first so many bytes of each span, end to end."""
        tokens = ragged_ranges(spans.starts, spans.stops - spans.starts)
        records = self.records.take(tokens)
        data = self.text.take(ragged_ranges(records["start"], records["length"]))
        sizes = self.sizes_of(spans)
        return data if (sizes == counts).all() else data[ragged_ranges(np.cumsum(sizes) - sizes, counts)]

    def supervised(self, spans: _Spans, supervised: Bool[ndarray, "token"] | None) -> Bool[ndarray, "chunk"]:
        """Whether all tokens of a chunk are supervised."""
        if supervised is None:
            return np.ones(len(spans.starts), bool)
        lacking = running(~(supervised | self.records["skipped"]))
        return lacking.take(spans.starts) == lacking.take(spans.stops)

    def chunk_of(self, spans: _Spans) -> Int32[ndarray, "token"]:
        """The number of every token's chunk, or -1."""
        chunk_of = np.full(len(self.records), -1, np.int32)
        chunk_of[spans.starts] = np.arange(len(spans.starts), dtype=np.int32)
        widths = spans.stops - spans.starts
        wide = np.flatnonzero(widths > 1)
        tokens, numbers = ragged_ranges(spans.starts[wide], widths[wide]), np.repeat(wide, widths[wide])
        chunk_of[tokens] = np.where(self.records["skipped"][tokens], -1, numbers)
        return chunk_of


def _common_ends(
    ours: _Side, theirs: _Side
) -> tuple[Int[ndarray, "chunk"], tuple[Int[ndarray, "chunk"], Int[ndarray, "chunk"]]]:
    """Where tokens of both sides end at the same byte: its segment, and the token of each side."""
    room = np.maximum(ours.sizes, theirs.sizes)
    begins = running(room)
    ends = []
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
    ours: _Side, theirs: _Side, spans: tuple[_Spans, _Spans], segment: Int[ndarray, "chunk"]
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
        side.data(_Spans(*map(np.concatenate, zip(one.take(unsure), rest.take(open_), strict=True))), counts)
        for side, one, rest in zip((ours, theirs), spans, rests, strict=True)
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
