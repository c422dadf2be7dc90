"""Logits in chunks: their projection from hidden states, and the gradients of hidden states and head."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmkd.errors import UserError

# The number of fp32 logits that are compared at a time. On a CPU a tile of this size stays in the cache, while a
# larger one is read from memory by every operation. A GPU needs larger tiles to be busy, and memory for the
# temporaries of the comparison: about TILE_BYTES per logit.
CPU_TILE_ELEMENTS = 1 << 17
GPU_TILE_ELEMENTS = 1 << 23
TILE_BYTES = 64


class Head(Protocol):
    """The map from hidden states to logits, such as `mmkd.models.heads.LMHead`."""

    @property
    def weight(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def vocab_size(self) -> int: ...
    def frozen(self, dtype: torch.dtype) -> "Head": ...
    def project(self, hidden: Tensor, out: Tensor) -> Tensor: ...
    def finish(self, logits: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Projection:
    """The computation of logits from hidden states: the head, the type, and the number of tokens at a time."""

    head: Head
    dtype: torch.dtype
    chunk_size: int
    precise: bool

    @classmethod
    def here(cls, hidden: Tensor, head: Head, chunk_size: int, precise: bool) -> "Projection":
        """A projection in the autocast type at the call, or else in the type of the head."""
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
        return cls(head, dtype, chunk_size, precise)

    @property
    def wide(self) -> torch.dtype:
        """The type of sums and comparisons."""
        return torch.promote_types(self.dtype, torch.float32)

    def chunks(self, hidden: Tensor) -> Iterator["LogitsChunk"]:
        """The logits before `Head.finish`, in one buffer that the next chunk overwrites.

        Call it with autocast disabled, which would round the wide products.
        """
        head = self.head.frozen(self.dtype)
        dtype = self.wide if self.precise else self.dtype
        buffer = hidden.new_empty(min(self.chunk_size, len(hidden)), head.vocab_size, dtype=dtype)
        for start in starts(len(hidden), self.chunk_size):
            rows = slice(start, min(start + self.chunk_size, len(hidden)))
            states = hidden.detach()[rows].to(self.dtype)
            yield LogitsChunk(rows, states, head.weight, head.project(states, buffer[: len(states)]))


@dataclass(frozen=True)
class LogitsChunk:
    """The logits of some tokens, and the states and weight of which they are the product."""

    rows: slice
    states: Float[Tensor, "token width"]
    weight: Float[Tensor, "vocab width"]
    logits: Float[Tensor, "token vocab"]

    def tiles(self) -> Iterator[slice]:
        """Slices of rows, each to be compared at once."""
        length, vocab = self.logits.shape
        size = tile_rows(vocab, self.logits.device.type)
        for start in starts(length, size):
            yield slice(start, min(start + size, length))


@dataclass
class HeadGradients:
    """The gradients that one call accumulates; None for an input that needs no gradient."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def zeros(cls, projection: Projection, hidden: Tensor, needs: tuple[bool, ...]) -> "HeadGradients":
        """Zeros for hidden, weight and bias where they need a gradient."""
        # In fp32 the gradient of a head of 152k x 896 takes 0.5 GB, so that only `precise` pays for it. A bias is
        # small, and its sum over all tokens is what rounding would hurt most.
        weight, bias, wide = projection.head.weight, projection.head.bias, projection.wide
        return cls(
            torch.zeros_like(hidden) if needs[0] else None,
            torch.zeros_like(weight, dtype=wide if projection.precise else None) if needs[1] else None,
            torch.zeros_like(bias, dtype=wide) if bias is not None and needs[2] else None,
        )

    def accumulate(self, chunk: LogitsChunk) -> None:
        """Adds the gradients of a chunk whose logits have been overwritten by their gradient."""
        grad_logits = chunk.logits
        # A head that is trimmed to the shared tokens has fewer logits than rows; its padding rows keep a zero
        # gradient.
        if self.bias is not None:
            self.bias[: grad_logits.shape[1]] += grad_logits.sum(0, dtype=self.bias.dtype)
        grad_logits = grad_logits.to(chunk.states.dtype)
        if self.hidden is not None:
            self.hidden[chunk.rows] = grad_logits @ chunk.weight
        if self.weight is not None:
            _accumulate_product(self.weight[: len(chunk.weight)], grad_logits.T, chunk.states)

    def result(self, head: Head) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of hidden, weight and bias, in the types of the head."""
        grad_weight = None if self.weight is None else self.weight.to(head.weight.dtype)
        grad_bias = None if self.bias is None or head.bias is None else self.bias.to(head.bias.dtype)
        return self.hidden, grad_weight, grad_bias


class ReadyGradients:
    """Gradients from the forward pass, for one backward pass, or with `repeatable` for several."""

    def __init__(self, gradients: Sequence[Tensor | None], repeatable: bool):
        self._gradients: Sequence[Tensor | None] | None = gradients
        self._repeatable = repeatable

    def scaled(self, factor: Tensor) -> list[Tensor | None]:
        """The gradients times the factor: scaled in place and released, or with `repeatable` copies.

        In place, because a copy would double the memory of the head's gradient, the largest of all.
        """
        if self._gradients is None:
            raise RuntimeError(
                "The gradients of this loss are scaled in place and can be backpropagated only once. Pass "
                "repeatable=True to backpropagate more than once."
            )
        gradients = self._gradients
        if self._repeatable:
            return [None if gradient is None else gradient * factor for gradient in gradients]
        self._gradients = None
        return [None if gradient is None else gradient.mul_(factor) for gradient in gradients]


def check_labels(labels: Int[Tensor, "token"], vocab_size: int) -> None:
    """Raises UserError for a label that is not a token of the vocabulary."""
    low, high = 0, 0
    if len(labels):
        # One transfer of both numbers, as a GPU has to finish all queued work for each.
        low, high = cast(Any, torch.stack(labels.aminmax())).tolist()
    if not 0 <= low <= high < vocab_size:
        raise UserError(
            f"Labels run from {low} to {high} but the head has {vocab_size} tokens; "
            "the text was tokenised with another vocabulary."
        )


def tile_rows(vocab_size: int, device_type: str) -> int:
    """The number of rows of logits that are compared at a time, in fp32."""
    return max(1, (CPU_TILE_ELEMENTS if device_type == "cpu" else GPU_TILE_ELEMENTS) // vocab_size)


def logits_bytes(vocab_size: int, chunk_size: int, models: int, precise: bool, device_type: str) -> int:
    """The peak memory of logits in bytes: a chunk of logits per model, and the comparison of a tile."""
    compared = min(chunk_size, tile_rows(vocab_size, device_type))
    return (chunk_size * (2 * models + 2 * precise) + compared * TILE_BYTES) * vocab_size


def starts(length: int, step: int) -> range:
    """The first rows of the pieces of a batch. An empty batch is one empty piece, so that its sums exist as zeros."""
    return range(0, max(length, 1), step)


def _accumulate_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`; if the types differ, in blocks of rows, so that the whole product is never stored."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    if total.device.type == "cuda":
        # cuBLAS accumulates half-precision inputs into fp32 without rounding the product first.
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
        return
    for start in range(0, len(left), 4096):
        block = slice(start, start + 4096)
        total[block] += left[block] @ right
