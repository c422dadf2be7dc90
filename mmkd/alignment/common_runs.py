"""The runs of bytes that two texts have in common, where parts of one are missing or spelt otherwise in the other."""

from bisect import bisect_left

import numpy as np
from jaxtyping import Int, UInt8
from numpy import ndarray
from numpy.lib.stride_tricks import sliding_window_view

# How many bytes must be the same, and occur once on both sides, for what follows a difference to be taken for the same
# text again; fewer beside an unknown token, of which it is known that it stands for something.
_SURE = 8
_BESIDE_UNKNOWN = 4

Run = tuple[int, int, int]
"""Where a run begins in one text and in the other, and its length."""


def common_runs(one: UInt8[ndarray, "byte"], other: UInt8[ndarray, "other"], unknown: tuple[int, int]) -> list[Run]:
    """What is the same from the start on, then runs found by bytes that occur once; all end at whole characters.

    `unknown` are the bytes that stand for unknown text in either. Takes a time that hardly grows faster than the
    texts (patience diff).
    """
    first = _equal(one, other)
    if first == min(len(one), len(other)):
        return [(0, 0, first)] if first else []
    runs = [(0, 0, first), *_between(one, other, (first, len(one), first, len(other)), unknown)]
    return [run for run in (_whole_characters(one, other, run) for run in runs) if run[2]]


def _equal(one: ndarray, other: ndarray) -> int:
    """How many bytes are the same from the start on."""
    length = min(len(one), len(other))
    differing = one[:length] != other[:length]
    first = int(differing.argmax()) if length else 0
    return first if length and differing[first] else length


def _between(one: ndarray, other: ndarray, window: tuple[int, int, int, int], unknown: tuple[int, int]) -> list[Run]:
    """The runs within `one[i:stop]` and `other[j:end]`, in order."""
    i, stop, j, end = window
    anchors = _unique(one[i:stop], other[j:end], _SURE)
    if not anchors and (unknown[0] in one[i:stop] or unknown[1] in other[j:end]):
        anchors = _unique(one[i:stop], other[j:end], _BESIDE_UNKNOWN)
    runs: list[Run] = []
    if not anchors:
        return runs
    for begin, begin_other in [(i + a, j + b) for a, b in anchors]:
        if begin < i or begin_other < j:
            continue
        back = _equal(one[i:begin][::-1], other[j:begin_other][::-1])
        length = back + _equal(one[begin:stop], other[begin_other:end])
        start, start_other = begin - back, begin_other - back
        runs += _between(one, other, (i, start, j, start_other), unknown)
        runs.append((start, start_other, length))
        i, j = start + length, start_other + length
    return runs + _between(one, other, (i, stop, j, end), unknown)


def _unique(one: ndarray, other: ndarray, length: int) -> list[tuple[int, int]]:
    """Places of so many equal bytes that occur once in both texts, the most that are in the same order in both."""
    if min(len(one), len(other)) < length:
        return []
    places = []
    for side in (one, other):
        grams = np.ascontiguousarray(sliding_window_view(side, length)).view(f"<u{length}")[:, 0]
        values, where, counts = np.unique(grams, return_index=True, return_counts=True)
        places.append((values[counts == 1], where[counts == 1]))
    _, ours, theirs = np.intersect1d(places[0][0], places[1][0], assume_unique=True, return_indices=True)
    left, right = places[0][1][ours], places[1][1][theirs]
    order = np.argsort(left)
    left, right = left[order], right[order]
    if not (np.diff(right) > 0).all():
        kept = _increasing(right)
        left, right = left[kept], right[kept]
    return list(zip(left.tolist(), right.tolist(), strict=True))


def _increasing(values: Int[ndarray, "item"]) -> list[int]:
    """The places of a longest increasing subsequence."""
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
    chain = []
    place = last[-1] if last else -1
    while place >= 0:
        chain.append(place)
        place = before[place]
    return chain[::-1]


def _whole_characters(one: ndarray, other: ndarray, run: Run) -> Run:
    """The run without parts of characters at its ends, which may belong to different ones."""
    i, j, length = run
    while i and length and _continues(one[i]):
        i, j, length = i + 1, j + 1, length - 1
    stops = [side[place + length] for side, place in ((one, i), (other, j)) if place + length < len(side)]
    if length and any(map(_continues, stops)):
        while length and _continues(one[i + length - 1]):
            length -= 1
        length -= length > 0
    return i, j, length


def _continues(byte: int) -> bool:
    """Whether a byte of UTF-8 is not the first of its character."""
    return 0x80 <= byte < 0xC0
