"""Encoding of a teacher's last hidden states of one sequence: byte planes, a zstd frame per plane.

A plane holds one byte of every value, channel by channel, because the values of a channel resemble each other. In 8
bits a channel has a scale for every `BLOCK` states in a row: a few channels are far larger than the others in all
states, so that blocks of channels, as usual for weights, lose eight times as much (KL 2.7e-3 against 3.3e-4 nats on
SmolLM2-135M-Instruct, at 482 and 565 bytes per state).
"""

import struct
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmkd.errors import UserError

DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": torch.int8,
}
BLOCK = 64
"""States of a channel that share a scale in 8 bits."""

_ZSTD = pa.Codec("zstd", compression_level=3)
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
"""Bytes of a type -> the integers of its size, for numpy and others who lack the type itself."""


@dataclass(frozen=True)
class TokenStates:
    """A teacher's last hidden states in one sequence: those that predict a supervised token, then visual tokens'."""

    hidden: Float[Tensor, "state width"]
    visual: int = 0
    """How many of them, at the end, are of visual tokens that predict no supervised token."""

    def __len__(self) -> int:
        return len(self.hidden) - self.visual


@dataclass(frozen=True)
class StoredStates:
    """The states of one sequence as they are stored; in 8 bits with the scales of their blocks."""

    values: Tensor
    scales: Float[Tensor, "block width"] | None = None
    visual: int = 0

    def __len__(self) -> int:
        return len(self.values) - self.visual

    @property
    def hidden(self) -> Float[Tensor, "state width"]:
        """The states themselves."""
        if self.scales is None:
            return self.values
        return dequantised(self.values, self.scales, torch.arange(len(self.values)) // BLOCK)


@dataclass(frozen=True)
class StateCodec:
    """Encodes and decodes the states of one cache, of `width` channels, in one of `DTYPES`."""

    dtype: str
    width: int
    vocab_size: int
    visual: bool = False
    """Whether the states of visual tokens are kept too."""

    kind = "hidden"

    def encode(self, states: TokenStates) -> bytes:
        """The blob of one sequence. Raises UserError where float16 is too narrow for a state."""
        sections = [stored] = [states.hidden.detach().cpu()]
        if self.dtype == "int8":
            sections = list(_quantised(stored.float()))
        else:
            sections = [stored.to(DTYPES[self.dtype])]
            if not sections[0].isfinite().all():
                raise UserError(
                    f"A hidden state of the teacher is as large as {float(stored.abs().max()):g}, too large for "
                    "float16. Set cache_hidden_dtype: bfloat16."
                )
        frames = [_ZSTD.compress(plane, asbytes=True) for section in sections for plane in _planes(section)]
        return struct.pack(f"<{len(frames) + 1}I", states.visual, *map(len, frames)) + b"".join(frames)

    def decode(self, blob: bytes | memoryview, tokens: int) -> StoredStates:
        """The states of one sequence of `tokens` supervised tokens."""
        (visual,) = struct.unpack_from("<I", blob)
        states, dtype = tokens + visual, DTYPES[self.dtype]
        shapes = [(states, dtype)]
        if self.dtype == "int8":
            shapes.append((-(-states // BLOCK), torch.bfloat16))
        sizes = struct.unpack_from(f"<{sum(dtype.itemsize for _, dtype in shapes)}I", blob, 4)
        start, place, sections = 4 + 4 * len(sizes), 0, []
        for rows, dtype in shapes:
            raw = np.empty((self.width, rows, dtype.itemsize), dtype=np.uint8)
            for byte in range(dtype.itemsize):
                frame = blob[start : start + sizes[place]]
                plane = _ZSTD.decompress(frame, decompressed_size=self.width * rows)
                raw[..., byte] = np.frombuffer(plane, dtype=np.uint8).reshape(self.width, rows)
                start, place = start + sizes[place], place + 1
            bits = raw.view(f"<i{dtype.itemsize}")[..., 0]
            sections.append(torch.from_numpy(np.ascontiguousarray(bits.T)).view(dtype))
        return StoredStates(sections[0], sections[1] if len(sections) > 1 else None, visual)


def dequantised(
    values: Int[Tensor, "state width"], scales: Float[Tensor, "block width"], block: Int[Tensor, "state"]
) -> Float[Tensor, "state width"]:
    """States from their 8 bits and the scale of the block that each is in."""
    return values.float() * scales.float()[block]


def _quantised(states: Float[Tensor, "state width"]) -> tuple[Tensor, Tensor]:
    """The 8 bits of the states, and a scale per block and channel."""
    blocks = states.split(BLOCK)
    peaks = torch.stack([block.abs().amax(0) for block in blocks]) if len(states) else states
    # As they are stored, so that what is rounded off is that of the states alone. A channel of zeros stays one.
    scales = (peaks / 127).to(torch.bfloat16)
    steps = torch.where(scales > 0, scales.float(), 1.0).repeat_interleave(BLOCK, 0)[: len(states)]
    return (states / steps).round().clamp(-127, 127).to(torch.int8), scales


def _planes(values: Tensor) -> list[np.ndarray]:
    """The bytes of the values, one plane per byte, lowest byte first, channel by channel."""
    size = values.dtype.itemsize
    bits = np.ascontiguousarray(values.view(BITS[size]).numpy().T.astype(f"<i{size}"))
    raw = bits[..., None].view(np.uint8)
    return [np.ascontiguousarray(raw[..., byte]) for byte in range(size)]
