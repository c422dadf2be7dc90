"""From a teacher's logits to what is kept of them: top-k, the tail's mass, and draws from the tail."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmkd.cache.codec import TokenScores
from mmkd.losses.divergences import log_one_minus_exp
from mmkd.losses.projection import tile_rows
from mmkd.teachers.signals import DenseSignal

_CHUNK = 256


@torch.no_grad()
def score_tokens(signal: DenseSignal, k: int, m: int, offsets: Float[np.ndarray, "token"]) -> TokenScores:
    """The top-k of every token, its tail's mass and m systematic draws from the tail.

    The draws of token i are the tail's quantiles (offsets[i] + j) / m for j < m (offsets in [0, 1)): each token of the
    tail is drawn m times its share of the tail on average, with less spread than independent draws have.
    """
    parts: list[tuple[Tensor, ...]] = []
    for start, chunk in zip(range(0, len(signal.hidden), _CHUNK), signal.chunks(_CHUNK), strict=False):
        rows, vocab = chunk.logits.shape
        tile = tile_rows(vocab, chunk.logits.device.type)
        for first in range(0, rows, tile):
            log_probs = chunk.head.finish(chunk.logits[first : first + tile].float()).log_softmax(-1)
            values, ids = log_probs.topk(k)
            # Without any exact outcome the tail is everything.
            tail = log_one_minus_exp(values.logsumexp(-1)) if k else values.new_zeros(len(values))
            offset = torch.from_numpy(offsets[start + first : start + first + len(values)]).to(tail)
            parts.append((ids, values, tail_draws(log_probs, ids, m, offset), tail))
    ids, values, draws, tails = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
    return TokenScores(ids.astype(np.int32), values, draws.astype(np.int32), tails)


@torch.no_grad()
def label_log_probs(signal: DenseSignal, labels: Int[Tensor, "token"]) -> Float[np.ndarray, "token"]:
    """The log-prob of one token per position."""
    parts = []
    for start, chunk in zip(range(0, len(signal.hidden), _CHUNK), signal.chunks(_CHUNK), strict=False):
        logits = chunk.head.finish(chunk.logits.float())
        chosen = logits.gather(-1, labels[start : start + _CHUNK, None])[:, 0]
        parts.append(chosen - logits.logsumexp(-1))
    return torch.cat(parts).cpu().numpy()


def tail_draws(
    log_probs: Float[Tensor, "token vocab"],
    exact: Int[Tensor, "token k"],
    m: int,
    offsets: Float[Tensor, "token"],
) -> Int[Tensor, "token m"]:
    """m systematic draws from what is left of a distribution without its `exact` outcomes."""
    if not m:
        return exact[:, :0]
    tail = log_probs.exp().scatter(-1, exact, 0.0)
    # In fp32, sums over a large vocabulary lose its rare tokens.
    cumulative = tail.cumsum(-1, dtype=torch.float64)
    places = (offsets.double()[:, None] + torch.arange(m, device=tail.device)) / m
    # An offset that rounds to 1 would point behind the last token of the tail.
    quantiles = places.clamp(max=1 - 2**-52) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, quantiles, right=True).clamp(max=tail.shape[-1] - 1)
