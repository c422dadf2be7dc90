"""The most likely tokens of whoever teaches, of whatever kind its signal is."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmkd.generation.interleaved import LikelyTokens
from mmkd.teachers.signals import DenseSignal, MixedSignal, RoutedSignal, SparseSignal


def likely_tokens(
    signal: Any, top_k: int, vocab_size: int, silenced: Sequence[int], supervised: Bool[Tensor, "row position"]
) -> LikelyTokens:
    """The teacher's most likely tokens at the supervised places of a batch, of those that an answer may hold.

    Of several teachers that are mixed, those of the mixture; of teachers that have tokens of their own, each one's.
    """
    if isinstance(signal, RoutedSignal):
        parts = {
            name: likely_tokens(part, top_k, vocab_size, silenced, supervised) for name, part in signal.signals.items()
        }
        width, places = max(part.ids.shape[1] for part in parts.values()), int(supervised.sum())
        # Batches that are made to be judged are on the CPU, what is said of them on the model's device.
        supervised = supervised.to(next(iter(signal.masks.values())).device)
        ids = torch.full((places, width), -1, device=supervised.device)
        log_probs = torch.full((places, width), -torch.inf, device=supervised.device)
        for name, part in parts.items():
            mask = signal.masks[name]
            own = mask.expand_as(_with_first(supervised))[:, 1:][supervised]
            ids[own, : part.ids.shape[1]] = part.ids
            log_probs[own, : part.ids.shape[1]] = part.log_probs
        return LikelyTokens(ids, log_probs)
    log_probs = _log_probs(signal, vocab_size)
    log_probs[:, [token for token in silenced if token < vocab_size]] = -torch.inf
    top = log_probs.topk(min(top_k, vocab_size), dim=-1)
    # Of a teacher that lists few tokens, the others are not known to be likely.
    return LikelyTokens(top.indices.masked_fill(top.values == -torch.inf, -1), top.values)


def _with_first(supervised: Tensor) -> Tensor:
    """With the position that nothing predicts."""
    return torch.cat([supervised[:, :1], supervised], dim=1)


def _log_probs(signal: Any, vocab_size: int) -> Float[Tensor, "place vocab"]:
    """Over the whole vocabulary; -inf where a teacher does not list a token."""
    if isinstance(signal, MixedSignal):
        parts = [
            torch.tensor(signal.weights[name]).log().item() + _log_probs(part, vocab_size)
            for name, part in signal.signals.items()
        ]
        return torch.stack(parts).logsumexp(0)
    if isinstance(signal, DenseSignal):
        return signal.head.trimmed(vocab_size).log_probs(signal.hidden)
    assert isinstance(signal, SparseSignal)
    log_probs = signal.log_probs.new_full((len(signal.ids), vocab_size), -torch.inf)
    known = signal.ids < vocab_size
    values = signal.log_probs.masked_fill(~known, -torch.inf)
    return log_probs.scatter_reduce_(-1, signal.ids.long() * known, values, "amax")
