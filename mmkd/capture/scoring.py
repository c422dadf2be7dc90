"""From a teacher's logits to what is kept of them: top-k, the tail's mass, and draws from the tail."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
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
def score_labels(
    signal: DenseSignal, labels: Int[Tensor, "token"], boundaries: Bool[Tensor, "vocab"] | None = None
) -> TokenScores:
    """The log-prob of one token per position and, where a set of tokens is given, that of the set as a whole."""
    parts: list[list[Tensor]] = []
    for start, chunk in zip(range(0, len(signal.hidden), _CHUNK), signal.chunks(_CHUNK), strict=False):
        logits = chunk.head.finish(chunk.logits.float())
        normaliser = logits.logsumexp(-1)
        own = logits.gather(-1, labels[start : start + _CHUNK, None])[:, 0] - normaliser
        parts.append([own])
        if boundaries is not None:
            outside = ~boundaries[: logits.shape[1]].to(logits.device)
            inside = logits.masked_fill_(outside, -torch.inf).logsumexp(-1)
            # Rounding may give a probability above one.
            parts[-1].append((inside - normaliser).clamp(max=0))
    if not parts:
        return TokenScores.of_labels(*np.zeros((1 if boundaries is None else 2, 0), dtype=np.float32))
    return TokenScores.of_labels(*(torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True)))


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
