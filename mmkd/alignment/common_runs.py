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


def common_runs(left: UInt8[ndarray, "byte"], right: UInt8[ndarray, "other"], unknown: tuple[int, int]) -> list[Run]:
    """What is the same from the start on, then runs found by bytes that occur once; all end at whole characters.

    `unknown` are the bytes that stand for unknown text in either. Takes a time that hardly grows faster than the
    texts (patience diff).
    """
    first = _equal(left, right)
    if first == min(len(left), len(right)):
        return [(0, 0, first)] if first else []
    runs = [(0, 0, first), *_between(left, right, (first, len(left), first, len(right)), unknown)]
    return [run for run in (_whole_characters(left, right, run) for run in runs) if run[2]]


def _equal(left: ndarray, right: ndarray) -> int:
    """How many bytes are the same from the start on."""
    length = min(len(left), len(right))
    differing = left[:length] != right[:length]
    first = int(differing.argmax()) if length else 0
    return first if length and differing[first] else length


def _between(left: ndarray, right: ndarray, window: tuple[int, int, int, int], unknown: tuple[int, int]) -> list[Run]:
    """The runs within `one[i:stop]` and `other[j:end]`, in order."""
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
        back = _equal(left[i:begin][::-1], right[j:begin_other][::-1])
        length = back + _equal(left[begin:stop], right[begin_other:end])
        start, start_other = begin - back, begin_other - back
        runs += _between(left, right, (i, start, j, start_other), unknown)
        runs.append((start, start_other, length))
        i, j = start + length, start_other + length
    return runs + _between(left, right, (i, stop, j, end), unknown)


def _unique(left: ndarray, right: ndarray, length: int) -> list[tuple[int, int]]:
    """Places of so many equal bytes that occur once in both texts, the most that are in the same order in both."""
    if min(len(left), len(right)) < length:
        return []
    places: list[tuple[ndarray, ndarray]] = []
    for side in (left, right):
        grams = np.ascontiguousarray(sliding_window_view(side, length)).view(f"<u{length}")[:, 0]
        values, where, counts = np.unique(grams, return_index=True, return_counts=True)
        places.append((values[counts == 1], where[counts == 1]))
    _, ours, theirs = np.intersect1d(places[0][0], places[1][0], assume_unique=True, return_indices=True)
    first_places, second_places = places[0][1][ours], places[1][1][theirs]
    order = np.argsort(first_places)
    first_places, second_places = first_places[order], second_places[order]
    if not (np.diff(second_places) > 0).all():
        kept = _increasing(second_places)
        first_places, second_places = first_places[kept], second_places[kept]
    return list(zip(first_places.tolist(), second_places.tolist(), strict=True))


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
    chain: list[int] = []
    place = last[-1] if last else -1
    while place >= 0:
        chain.append(place)
        place = before[place]
    return chain[::-1]


def _whole_characters(left: ndarray, right: ndarray, run: Run) -> Run:
    """The run without parts of characters at its ends, which may belong to different ones."""
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
    """Whether a byte of UTF-8 is not the first of its character."""
    return 0x80 <= byte < 0xC0
