"""Encoding of a teacher's scores of one sequence: ids in byte planes, log-probs in 8 bits, a zstd frame per plane.

Ids are stored as their rank in a `TokenOrder`, most frequent token first, so that the high bytes are mostly zero and
compress well; a row of a plane holds the ranks of one place in the top-k. Log-probs are companded: the step grows from
0.013 nats near probability 1 to 0.3 nats at 1e-10, where no result depends on it. They decrease with the place, so
that their differences are small numbers and are stored in place of them.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

KINDS = ("top_k", "log_probs", "hidden")
"""What a cache may hold of each supervised token; `state_codec` encodes the last of them."""

_ZSTD = pa.Codec("zstd", compression_level=3)
# The smallest log-prob in nats; a probability of 4e-11.
_FLOOR = 24.0
_CODES = np.arange(256, dtype=np.float64)
_STEP = np.log1p(_FLOOR) / 255
_LOG_PROBS = (-np.expm1(_CODES * _STEP)).astype(np.float32)
_PROBS = np.exp(_LOG_PROBS)


@dataclass(frozen=True)
class TokenScores:
    """A teacher's scores of the supervised tokens of one sequence, in order, in nats.

    A top-k has the most likely ids in order, systematic draws from the tail (ids, each with an equal share of the
    tail) and the mass of the tail. The kind log_probs has k = 1, the token itself, no tail and, where they are kept,
    the log-probs that a new word begins there or the text ends.
    """

    ids: Int[np.ndarray, "token k"]
    log_probs: Float[np.ndarray, "token k"]
    draws: Int[np.ndarray, "token m"]
    tail_log_probs: Float[np.ndarray, "token"]
    boundary_log_probs: Float[np.ndarray, "token"] | None = None

    @classmethod
    def of_labels(
        cls, log_probs: Float[np.ndarray, "token"], boundary_log_probs: Float[np.ndarray, "token"] | None = None
    ) -> "TokenScores":
        """The scores of the kind log_probs."""
        nothing = np.zeros((len(log_probs), 0), dtype=np.int32)
        no_tail = np.full(len(log_probs), -np.inf, dtype=np.float32)
        return cls(nothing, log_probs[:, None], nothing, no_tail, boundary_log_probs)

    def __len__(self) -> int:
        return len(self.ids)

    def split(self, counts: Sequence[int]) -> list["TokenScores"]:
        """The scores of several sequences that stand end to end, by their numbers of tokens."""
        assert len(self) == sum(counts)
        stops = np.cumsum(counts).tolist()
        spans = [slice(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]
        parts = (self.ids, self.log_probs, self.draws, self.tail_log_probs, self.boundary_log_probs)
        return [TokenScores(*(None if part is None else part[span] for part in parts)) for span in spans]  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class TokenOrder:
    """The ids of a vocabulary, most frequent first."""

    ids: Int[np.ndarray, "vocab"]

    @staticmethod
    def of(counts: Int[np.ndarray, "vocab"]) -> "TokenOrder":
        """The order by counts of tokens in a text; tokens with equal counts are in the order of their ids."""
        return TokenOrder(np.argsort(-counts, kind="stable").astype(np.int32))

    @cached_property
    def ranks(self) -> Int[np.ndarray, "vocab"]:
        ranks = np.empty_like(self.ids)
        ranks[self.ids] = np.arange(len(self.ids), dtype=np.int32)
        return ranks


@dataclass(frozen=True)
class Codec:
    """Encodes and decodes the scores of one cache: `k` exact outcomes and `m` draws of a vocabulary.

    `boundaries` says whether the kind log_probs keeps those of new words, too.
    """

    kind: str
    k: int
    m: int
    order: TokenOrder
    boundaries: bool = False

    def encode(self, scores: TokenScores) -> bytes:
        """The blob of one sequence."""
        if self.kind == "log_probs":
            sections = [_halves(scores.log_probs)]
            if self.boundaries:
                assert scores.boundary_log_probs is not None
                sections.append(_halves(scores.boundary_log_probs[:, None]))
        else:
            codes = np.concatenate([_quantise(scores.log_probs), _quantise(scores.tail_log_probs[:, None])], axis=1)
            draws = np.sort(self.order.ranks[scores.draws], axis=1)
            sections = [
                _planes(self.order.ranks[scores.ids], self._width),
                np.diff(codes[:, :-1], axis=1, prepend=np.uint8(0)).T[None],
                codes[:, -1:].T[None],
                _planes(np.diff(draws, axis=1, prepend=0), self._width),
            ]
        planes = [plane for section in sections for plane in section if len(plane)]
        frames = [_ZSTD.compress(np.ascontiguousarray(plane), asbytes=True) for plane in planes]
        return struct.pack(f"<{len(frames)}I", *map(len, frames)) + b"".join(frames)

    def decode(self, blob: bytes | memoryview, tokens: int) -> TokenScores:
        """The scores of one sequence of `tokens` supervised tokens; a top-k and its tail sum to 1."""
        shapes = self._shapes()
        start = 4 * len(shapes)
        planes = []
        for size, rows in zip(struct.unpack_from(f"<{len(shapes)}I", blob), shapes, strict=True):
            raw = _ZSTD.decompress(blob[start : start + size], decompressed_size=rows * tokens)
            planes.append(np.frombuffer(raw, dtype=np.uint8).reshape(rows, tokens))
            start += size
        if self.kind == "log_probs":
            pairs = (planes[start : start + 2] for start in range(0, len(planes), 2))
            return TokenScores.of_labels(*(_joined(pair).view("<f2").astype(np.float32)[0] for pair in pairs))
        nothing = np.zeros((tokens, 0), dtype=np.int32)
        # Rows are places and columns are tokens throughout; the transposed views at the end cost no copy.
        ids = codes = np.zeros((0, tokens), dtype=np.uint8)
        if self.k:
            ids = self.order.ids.take(_joined(planes[: self._width]))
            codes = np.cumsum(planes[self._width], axis=0, dtype=np.uint8)
        codes = np.concatenate([codes, planes[(self._width + 1) if self.k else 0]])
        log_probs = _LOG_PROBS.take(codes)
        log_probs -= np.log(_PROBS.take(codes).sum(axis=0, dtype=np.float64))
        draws = nothing.T
        if self.m:
            draws = self.order.ids.take(np.cumsum(_joined(planes[-self._width :]), axis=0, dtype=np.int32))
        return TokenScores(ids.T, log_probs[:-1].T, draws.T, log_probs[-1])

    @property
    def _width(self) -> int:
        """Bytes of a rank."""
        return max(1, (len(self.order.ids) - 1).bit_length() + 7 >> 3)

    def _shapes(self) -> list[int]:
        """Rows of every plane; columns are tokens."""
        if self.kind == "log_probs":
            return [1, 1] * (1 + self.boundaries)
        exact = [*[self.k] * self._width, self.k] if self.k else []
        return [*exact, 1, *[self.m] * (self._width if self.m else 0)]


def _quantise(log_probs: Float[np.ndarray, "token k"]) -> Int[np.ndarray, "token k"]:
    return np.clip(np.rint(np.log1p(-np.minimum(log_probs, 0)) / _STEP), 0, 255).astype(np.uint8)


def _halves(values: Float[np.ndarray, "token k"]) -> Int[np.ndarray, "two k token"]:
    """Values of 16 bits in two planes."""
    return _planes(values.astype("<f2").view("<u2"), 2)


def _planes(values: Int[np.ndarray, "token k"], width: int) -> Int[np.ndarray, "width k token"]:
    """The bytes of the values in one plane per byte, lowest byte first."""
    raw = np.ascontiguousarray(values.T.astype("<u4")).view(np.uint8)
    return raw.reshape(*values.T.shape, 4).transpose(2, 0, 1)[:width]


def _joined(planes: list[np.ndarray]) -> Int[np.ndarray, "k token"]:
    size = 2 if len(planes) <= 2 else 4
    raw = np.zeros((*planes[0].shape, size), dtype=np.uint8)
    for place, plane in enumerate(planes):
        raw[..., place] = plane
    return raw.view(f"<u{size}")[..., 0]
