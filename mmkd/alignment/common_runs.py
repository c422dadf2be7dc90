"""The runs of bytes that two texts share, where parts of one are missing or spelt differently in the other."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from numpy import ndarray
from numpy.lib.stride_tricks import sliding_window_view

# How many bytes must be equal, and occur only once on each side, before the text after a difference counts as the same
# again. Fewer are enough beside an unknown token, because such a token certainly stands for some text.
_SURE = 8
_BESIDE_UNKNOWN = 4

Run = tuple[int, int, int]
"""Where a run begins in one text and in the other, and its length."""


def common_runs(left: UInt8[ndarray, "byte"], right: UInt8[ndarray, "other"], unknown: tuple[int, int]) -> list[Run]:
    """The common start, then the runs around byte sequences that occur once on each side; all end at whole characters.

    `unknown` holds the byte that stands for unknown text on each side. This is a patience diff, so that the time is
    almost linear in the length of the texts.
    """
    first = _equal(left, right)
    if first == min(len(left), len(right)):
        return [(0, 0, first)] if first else []
    runs = [(0, 0, first), *_between(left, right, (first, len(left), first, len(right)), unknown)]
    return [run for run in (_whole_characters(left, right, run) for run in runs) if run[2]]


def shared_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How long two texts, or lists of tokens, are the same from their start on."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (ours, theirs) in pairs if ours != theirs), min(len(first), len(second)))


def _equal(left: ndarray, right: ndarray) -> int:
    """The length of the common prefix."""
    length = min(len(left), len(right))
    differing = left[:length] != right[:length]
    first = int(differing.argmax()) if length else 0
    return first if length and differing[first] else length


def _between(left: ndarray, right: ndarray, window: tuple[int, int, int, int], unknown: tuple[int, int]) -> list[Run]:
    """The runs within `left[i:stop]` and `right[j:end]`, in order."""
    i, stop, j, end = window
    anchors = _unique(left[i:stop], right[j:end], _SURE)
    if not anchors and (unknown[0] in left[i:stop] or unknown[1] in right[j:end]):
        anchors = _unique(left[i:stop], right[j:end], _BESIDE_UNKNOWN)
    runs: list[Run] = []
    if not anchors:
        return runs
    for begin, begin_other in [(i + a, j + b) for a, b in anchors]:
        if begin < i or begin_other < j:
            continue
        # An anchor is extended in both directions before the gap in front of it is searched for anchors of its own.
        back = _equal(left[i:begin][::-1], right[j:begin_other][::-1])
        length = back + _equal(left[begin:stop], right[begin_other:end])
        start, start_other = begin - back, begin_other - back
        runs += _between(left, right, (i, start, j, start_other), unknown)
        runs.append((start, start_other, length))
        i, j = start + length, start_other + length
    return runs + _between(left, right, (i, stop, j, end), unknown)


def _unique(left: ndarray, right: ndarray, length: int) -> list[tuple[int, int]]:
    """Places of `length` equal bytes that occur once in each text; the largest set that is in order in both."""
    if min(len(left), len(right)) < length:
        return []
    places: list[tuple[ndarray, ndarray]] = []
    for side in (left, right):
        # Both lengths in use are widths of an integer, so that a sequence of bytes is one number for numpy to compare.
        grams = np.ascontiguousarray(sliding_window_view(side, length)).view(f"<u{length}")[:, 0]
        values, firsts, counts = np.unique(grams, return_index=True, return_counts=True)
        places.append((values[counts == 1], firsts[counts == 1]))
    ours, theirs = np.intersect1d(places[0][0], places[1][0], assume_unique=True, return_indices=True)[1:]
    left_places, right_places = places[0][1][ours], places[1][1][theirs]
    order = np.argsort(left_places)
    left_places, right_places = left_places[order], right_places[order]
    if not (np.diff(right_places) > 0).all():
        kept = _increasing(right_places)
        left_places, right_places = left_places[kept], right_places[kept]
    return list(zip(left_places.tolist(), right_places.tolist(), strict=True))


def _increasing(values: Int[ndarray, "item"]) -> list[int]:
    """The places of a longest increasing subsequence (patience sorting)."""
    tails: list[int] = []
    last: list[int] = []
    before: list[int] = []
    for place, value in enumerate(values.tolist()):
        length = bisect_left(tails, value)
        if length == len(tails):
            tails.append(value)
            last.append(place)
        else:
            tails[length], last[length] = value, place
        before.append(last[length - 1] if length else -1)
    chain: list[int] = []
    place = last[-1] if last else -1
    while place >= 0:
        chain.append(place)
        place = before[place]
    return chain[::-1]


def _whole_characters(left: ndarray, right: ndarray, run: Run) -> Run:
    """The run without incomplete characters at its ends: their other bytes may differ between the texts."""
    i, j, length = run
    while i and length and _continues(left[i]):
        i, j, length = i + 1, j + 1, length - 1
    stops = [side[place + length] for side, place in ((left, i), (right, j)) if place + length < len(side)]
    if length and any(map(_continues, stops)):
        while length and _continues(left[i + length - 1]):
            length -= 1
        length -= length > 0
    return i, j, length


def _continues(byte: int) -> bool:
    """Whether a byte of UTF-8 continues a character."""
    return 0x80 <= byte < 0xC0
