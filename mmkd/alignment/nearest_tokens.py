"""The token of one vocabulary that is nearest to each token of another by edit distance (MinED)."""

from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int

from mmkd.errors import UserError

# How many tokens with the longest common prefix are considered, and as many with the longest common suffix. The cost
# of all pairs of two vocabularies of 150k tokens would be 2e10 edit distances.
_NEIGHBOURS = 32
# Longer tokens (indentation, separators) are distinguished by their first bytes and their length.
_COMPARED_BYTES = 48
_PAIRS_AT_A_TIME = 1 << 17


def nearest_tokens(student: Sequence[bytes], teacher: Sequence[bytes]) -> Int[np.ndarray, "student"]:
    """The teacher token with the smallest edit distance in bytes to each student token; the first among equals.

    Tokens are the bytes that they decode to, so that vocabularies with different alphabets compare. The result is
    exact for tokens at distance 0 or 1. For all others it is the nearest of 64 candidates: the neighbours in the order
    by first bytes and in the order by last bytes. This sometimes misses a token that differs at both ends. Special
    tokens are treated as bytes like all others: override their entries. Raises UserError for an empty vocabulary of
    the teacher.
    """
    if not teacher:
        raise UserError("The teacher's vocabulary is empty, so no teacher token can be matched to a student token.")
    nearest = {token: index for index, token in reversed(list(enumerate(teacher)))}
    nearest |= _one_edit_away({token for token in student if token not in nearest}, teacher)
    nearest |= _among_neighbours({token for token in student if token not in nearest}, teacher)
    return np.array([nearest[token] for token in student], dtype=np.int64)


def edit_distances(left: Sequence[bytes], right: Sequence[bytes]) -> Int[np.ndarray, "pair"]:
    """The least number of inserted, deleted and replaced bytes from each of `left` to its partner in `right`.

    Only the first 48 bytes are compared; of the bytes after them only the number counts.
    """
    a, a_lengths = _matrix(left)
    b, b_lengths = _matrix(right)
    columns = np.arange(b.shape[1] + 1, dtype=np.int16)
    row = np.broadcast_to(columns, (len(left), len(columns)))
    result = np.where(a_lengths == 0, b_lengths, 0)
    for i in range(a.shape[1]):
        above = np.empty_like(row)
        above[:, 0] = i + 1
        np.minimum(row[:, 1:] + 1, row[:, :-1] + (a[:, i, None] != b), out=above[:, 1:])
        # An entry is also reached by an insertion from its left neighbour, at a cost of one per step: a running
        # minimum, once the cost of the steps is subtracted, in place of a loop over columns.
        row = np.minimum.accumulate(above - columns, axis=1) + columns
        done = a_lengths == i + 1
        result[done] = row[done, b_lengths[done]]
    # Bytes after the compared ones.
    beyond = [
        abs(max(0, len(x) - _COMPARED_BYTES) - max(0, len(y) - _COMPARED_BYTES))
        for x, y in zip(left, right, strict=True)
    ]
    return result + np.array(beyond, dtype=np.int64)


def _matrix(tokens: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([min(len(token), _COMPARED_BYTES) for token in tokens], dtype=np.int64)
    width = int(lengths.max(initial=0))
    joined = b"".join(token[:width].ljust(width, b"\0") for token in tokens)
    return np.frombuffer(joined, dtype=np.uint8).reshape(len(tokens), width), lengths


def _one_edit_away(tokens: Collection[bytes], teacher: Sequence[bytes]) -> dict[bytes, int]:
    """The first teacher token at distance 1 from each token; tokens without any are left out."""
    index_of = {token: index for index, token in reversed(list(enumerate(teacher)))}
    gaps = {gap for token in tokens for gap in _gaps(token)}
    longer: dict[bytes, int] = {}
    replaced: dict[tuple[int, bytes], int] = {}
    for index, teacher_token in enumerate(teacher):
        for gap in _gaps(teacher_token):
            if gap[1] in tokens:
                longer.setdefault(gap[1], index)
            if gap in gaps:
                replaced.setdefault(gap, index)
    nearest: dict[bytes, int] = {}
    for token in tokens:
        edits = [longer.get(token), *(replaced.get(gap) for gap in _gaps(token))]
        edits += [index_of.get(shorter) for _, shorter in _gaps(token)]
        indices = [index for index in edits if index is not None]
        if indices:
            nearest[token] = min(indices)
    return nearest


def _gaps(token: bytes) -> Iterator[tuple[int, bytes]]:
    """Each position in the token, and the token without the byte there."""
    return ((i, token[:i] + token[i + 1 :]) for i in range(len(token)))


def _among_neighbours(tokens: Collection[bytes], teacher: Sequence[bytes]) -> dict[bytes, int]:
    """The nearest teacher token among the neighbours of each token in two orders."""
    index_of = {token: index for index, token in reversed(list(enumerate(teacher)))}
    result: dict[bytes, int] = {}
    # Sorted by length, so that the tokens of a batch need little padding.
    for pairs in _batches(_neighbours(sorted(tokens, key=lambda token: (len(token), token)), index_of)):
        left, right = zip(*pairs, strict=True)
        nearest: dict[bytes, tuple[int, int]] = {}
        for token, other, distance in zip(left, right, edit_distances(left, right).tolist(), strict=True):
            candidate = (distance, index_of[other])
            nearest[token] = min(nearest.get(token, candidate), candidate)
        result |= {token: index for token, (_, index) in nearest.items()}
    return result


def _neighbours(tokens: Iterable[bytes], teacher: Collection[bytes]) -> Iterator[list[tuple[bytes, bytes]]]:
    """For each token, its pairs with the teacher tokens of the longest common prefixes and suffixes."""
    by_prefix, by_suffix = sorted(teacher), sorted(token[::-1] for token in teacher)
    for token in tokens:
        near = {*_around(token, by_prefix), *(other[::-1] for other in _around(token[::-1], by_suffix))}
        yield [(token, other) for other in near]


def _around(token: bytes, ordered: Sequence[bytes]) -> Sequence[bytes]:
    place = bisect_left(ordered, token)
    return ordered[max(0, place - _NEIGHBOURS // 2) : place + _NEIGHBOURS // 2]


def _batches(parts: Iterable[list[tuple[bytes, bytes]]]) -> Iterator[list[tuple[bytes, bytes]]]:
    """The parts joined into larger batches; no part is divided."""
    batch: list[tuple[bytes, bytes]] = []
    for part in parts:
        if batch and len(batch) + len(part) > _PAIRS_AT_A_TIME:
            yield batch
            batch = []
        batch += part
    if batch:
        yield batch
