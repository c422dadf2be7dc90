"""A teacher's last hidden states on disk, as a batch brings them along, and the head that reads them."""

from collections.abc import Sequence
from copy import copy
from typing import Any, Self

import torch
from jaxtyping import Bool
from torch import Tensor

from mmkd.cache.side_files import check_side_files, read_head
from mmkd.cache.state_codec import BITS, BLOCK, DTYPES, StateCodec, StoredStates, dequantised
from mmkd.cache.store import Cache
from mmkd.models.heads import LMHead

from .batch import Targets, View
from .signals import DenseSignal


class CachedStates:
    """Turns the states of a cache into the signal of a teacher whose whole distribution is known.

    Raises UserError when the file of the head is missing or damaged.
    """

    def __init__(self, cache: Cache):
        assert isinstance(cache.codec, StateCodec)
        self.cache, self.codec = cache, cache.codec
        check_side_files(cache.folder, cache.manifest)
        self.vocab_size: int = self.codec.vocab_size
        self.softcap: float | None = cache.manifest.identity["signal"]["head_softcap"]
        self._head: LMHead | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Workers of a data loader read states; the head, which may be on a device, stays behind.
        return {**self.__dict__, "_head": None}

    def over_tokens(self, vocab_size: int) -> Self:
        """The same over the first tokens only."""
        states = copy(self)
        states.vocab_size = min(vocab_size, self.vocab_size)
        return states

    def place(self, device: torch.device) -> None:
        """Reads the head to a device."""
        self._head = read_head(self.cache.folder, self.cache.manifest, device)

    def tensors(self, states: Sequence[StoredStates]) -> dict[str, Tensor]:
        """The states of the sequences of a batch as integers, and which of them are of visual tokens alone."""
        nothing = torch.zeros(0, self.codec.width, dtype=DTYPES[self.codec.dtype])
        values = torch.cat([part.values for part in states] or [nothing])
        # DeepSpeed turns all floats of a batch into its own, shorter type.
        fields = {"values": values.view(BITS[values.dtype.itemsize])}
        if self.codec.dtype == "int8":
            scales = [part.scales for part in states if part.scales is not None]
            fields["scales"] = torch.cat(scales or [nothing.to(torch.bfloat16)]).view(torch.int16)
            ends = torch.tensor([0, *(len(part) for part in scales)]).cumsum(0)
            blocks = [
                torch.arange(len(part.values)) // BLOCK + end for part, end in zip(states, ends[:-1], strict=True)
            ]
            fields["block"] = torch.cat(blocks or [ends[:0]]).to(torch.int32)
        if self.codec.visual:
            marks = [torch.arange(len(part.values)) >= len(part) for part in states]
            fields["visual"] = torch.cat(marks or [torch.zeros(0, dtype=torch.bool)])
        return fields

    def signal(self, fields: Targets, view: View, asked: Bool[Tensor, "batch position"]) -> DenseSignal:
        """The signal about the asked positions of a view: those that predict a supervised token, or visual ones too.

        Rows that an evaluation repeats to fill its last batch come last and are not asked about.
        """
        assert self._head is not None, "placed before the first question"
        hidden = self._hidden(fields)
        if "visual" in fields:
            seen, predicting = fields["visual"], view.supervised[asked]
            chosen = hidden.new_empty(int(asked.sum()), self.codec.width)
            chosen[predicting] = hidden[~seen][: int(predicting.sum())]
            chosen[~predicting] = hidden[seen][: int((~predicting).sum())]
            hidden = chosen
        count = int(asked.sum())
        assert len(hidden) >= count
        return DenseSignal(hidden[:count].to(self._head.weight.dtype), self._head.trimmed(self.vocab_size))

    def _hidden(self, fields: Targets) -> Tensor:
        values = fields["values"].view(DTYPES[self.codec.dtype])
        if "scales" not in fields:
            return values
        return dequantised(values, fields["scales"].view(torch.bfloat16), fields["block"].long())
