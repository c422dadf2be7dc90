"""One side of an alignment: its tokens in segments, with the bytes that each covers."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np
from jaxtyping import Bool, Int, Int32, UInt8
from numpy import ndarray

from .markers import MarkerTable, Occurrences
from .pieces import BOUNDARY_BYTES, TokenPieces, Tokens, ragged_ranges, running


class Spans(NamedTuple):
    """Runs of tokens, from the first up to the one after the last."""

    starts: Int[ndarray, "chunk"]
    stops: Int[ndarray, "chunk"]

    def take(self, which: Int[ndarray, "kept"]) -> "Spans":
        return Spans(self.starts.take(which), self.stops.take(which))

    def pairs(self) -> Int[ndarray, "chunk 2"]:
        pairs = np.empty((len(self.starts), 2), np.int64)
        pairs[:, 0], pairs[:, 1] = self
        return pairs


# All properties of a token in one record: a lookup per token then waits for memory once instead of seven times.
_RECORD = np.dtype(
    [
        ("start", np.int32),
        ("length", np.int32),
        # Tokens with the same number have the same bytes; -1 is for tokens whose bytes must be compared.
        ("spelling", np.int32),
        # Belongs to no chunk: a special token that is not part of a paired marker.
        ("skipped", bool),
        # Begins a new pretoken.
        ("opens", bool),
        # May be the first token of a marker.
        ("marks", bool),
        # Stands for a text that cannot be recovered.
        ("unknown", bool),
    ],
    align=True,
)
_IS_BOUNDARY = np.isin(np.arange(256), np.frombuffer(BOUNDARY_BYTES, np.uint8))


def table_of(
    pieces: TokenPieces, markers: MarkerTable, spelling: Int32[ndarray, "vocab"], opens: Bool[ndarray, "vocab"]
) -> ndarray:
    """The record of every token of a vocabulary."""
    table = np.zeros(len(pieces), _RECORD)
    table["start"], table["length"], table["spelling"] = pieces.starts, pieces.lengths, spelling
    table["skipped"], table["opens"], table["marks"] = pieces.special, opens, markers.begins
    if pieces.unknown >= 0:
        table["unknown"][pieces.unknown] = True
    return table


def records_of(table: ndarray, tokens: Tokens) -> ndarray:
    """The records of tokens; for tokens that are placed in a text, with the bytes that they cover there."""
    records = table.take(tokens.ids)
    if tokens.placed:
        records["start"], records["length"], data = tokens.placed
        records["spelling"], records["unknown"] = -1, False
        records["opens"] = _IS_BOUNDARY[data[tokens.placed[0]]]
    return records


@dataclass(frozen=True)
class SegmentedTokens:
    """One side's tokens in segments: every row is a text, a paired marker, a text and so on up to a last text.

    Both sides have the same segments. A marker counts as a single zero byte, which its last token covers. `skipped`
    tokens belong to no chunk; other tokens without bytes (a part of a character) belong to the chunk of the next
    bytes.
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
        markers: Occurrences,
        partners: Int[ndarray, "pair"],
        supervised: Bool[ndarray, "token"] | None,
    ) -> Self:
        """The tokens divided at the markers with partners; tokens of hard markers without a partner are skipped."""
        count = len(tokens.rows) - 1
        if not len(markers.starts):
            return cls(tokens.data, records, tokens.rows, np.arange(count), np.zeros(count, bool))
        lengths, skipped = records["length"], records["skipped"]
        alone = np.ones(len(markers.starts), bool)
        alone[partners] = False
        members = markers[alone & markers.hard].tokens()
        lengths[members], skipped[members] = 0, True
        paired = markers[partners]
        members, last = paired.tokens(), paired.stops - 1
        lengths[members], skipped[members] = 0, False
        if supervised is not None:
            # A marker may be supervised in part: the end of a turn, but not the newline after it.
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
        """The number of bytes before each token, and after the last token."""
        return running(self.records["length"])

    @cached_property
    def sizes(self) -> Int[ndarray, "segment"]:
        """The number of bytes in each segment."""
        return np.diff(self.ends[self.bounds])

    @cached_property
    def has_unknown(self) -> Bool[ndarray, "segment"]:
        """The segments with an unknown token, whose text cannot be recovered."""
        return np.diff(running(self.records["unknown"])[self.bounds]) > 0

    @cached_property
    def blank(self) -> Bool[ndarray, "token"]:
        """The tokens without bytes."""
        return self.records["length"] == 0

    def leading_spaces(self) -> Int[ndarray, "segment"]:
        """The number of spaces at the start of each segment."""
        begins, stops = self.ends[self.bounds[:-1]], self.ends[self.bounds[1:]]
        spaces = np.zeros(len(begins), np.int64)
        open_, width = np.flatnonzero(begins < stops), 1
        # Most segments begin with no space or one: look at one byte first, and at 32 times more where all were spaces.
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
        """The same side without the first `counts[s]` bytes of each segment s (none where negative)."""
        if not (counts > 0).any():
            return self
        dropped = ragged_ranges(self.ends[self.bounds[:-1]], np.maximum(counts, 0))
        tokens = np.searchsorted(self.ends, dropped, "right") - 1
        records = self.records.copy()
        np.add.at(records["start"], tokens, 1)
        np.subtract.at(records["length"], tokens, 1)
        records["spelling"][tokens] = -1
        return replace(self, records=records)

    def spans(self, closing: Int[ndarray, "chunk"], segment: Int[ndarray, "chunk"]) -> Spans:
        """The chunks that end with the `closing` tokens, each from the first token that belongs to it."""
        stops = closing + 1
        starts = self.bounds.take(segment)
        np.maximum(starts[1:], stops[:-1], out=starts[1:])
        while (outside := self.records["skipped"][starts]).any():
            starts += outside
        return Spans(starts, stops)

    def at_boundary(self, spans: Spans, segment: Int[ndarray, "chunk"]) -> Bool[ndarray, "chunk"]:
        """Whether a chunk is followed by whitespace or ends its segment."""
        after, last = spans.stops, self.bounds[1:].take(segment)
        # Tokens without bytes are passed over.
        while (passed := (after < last) & self.blank.take(after, mode="clip")).any():
            after = after + passed
        return (after >= last) | self.records["opens"].take(after, mode="clip")

    def rests(self, spans: Spans, edges: Int[ndarray, "segment+1"]) -> Spans:
        """The tokens after the last span of each segment; segment s has the spans `edges[s] : edges[s + 1]`."""
        starts = self.bounds[:-1].copy()
        some = np.flatnonzero(np.diff(edges))
        starts[some] = spans.stops[edges[some + 1] - 1]
        return Spans(starts, self.bounds[1:])

    def sizes_of(self, spans: Spans) -> Int[ndarray, "span"]:
        """The number of bytes in each span."""
        return self.ends[spans.stops] - self.ends[spans.starts]

    def data(self, spans: Spans, counts: Int[ndarray, "span"]) -> UInt8[ndarray, "byte"]:
        """The first `counts[s]` bytes of each span s, end to end."""
        tokens = ragged_ranges(spans.starts, spans.stops - spans.starts)
        records = self.records.take(tokens)
        data = self.text.take(ragged_ranges(records["start"], records["length"]))
        sizes = self.sizes_of(spans)
        return data if (sizes == counts).all() else data[ragged_ranges(np.cumsum(sizes) - sizes, counts)]

    def covered(self, segment: int, unknown: int) -> tuple[bytes, Int[ndarray, "token"]]:
        """The bytes of a segment, the byte `unknown` for each unknown token, and where in them each token ends."""
        records = self.records[self.bounds[segment] : self.bounds[segment + 1]].copy()
        lost = records["unknown"] & (records["length"] == 0)
        records["start"][lost], records["length"][lost] = 0, 1
        ends = np.cumsum(records["length"], dtype=np.int64)
        data = self.text[ragged_ranges(records["start"], records["length"])]
        data[ends[lost] - 1] = unknown
        return data.tobytes(), ends

    def supervised(self, spans: Spans, supervised: Bool[ndarray, "token"] | None) -> Bool[ndarray, "chunk"]:
        """Whether all tokens of a chunk are supervised."""
        if supervised is None:
            return np.ones(len(spans.starts), bool)
        lacking = running(~(supervised | self.records["skipped"]))
        return lacking.take(spans.starts) == lacking.take(spans.stops)

    def chunk_of(self, spans: Spans) -> Int32[ndarray, "token"]:
        """The chunk of every token, or -1."""
        chunk_of = np.full(len(self.records), -1, np.int32)
        chunk_of[spans.starts] = np.arange(len(spans.starts), dtype=np.int32)
        widths = spans.stops - spans.starts
        wide = np.flatnonzero(widths > 1)
        tokens, numbers = ragged_ranges(spans.starts[wide], widths[wide]), np.repeat(wide, widths[wide])
        chunk_of[tokens] = np.where(self.records["skipped"][tokens], -1, numbers)
        return chunk_of
