"""Confidence interval of a difference between two trainings: paired bootstrap over items and seeds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from mmkd.errors import UserError

RESAMPLES = 10_000
LEVEL = 0.95

# The number of resamples at a time, so that thousands of items fit into memory.
_BLOCK = 500


@dataclass(frozen=True)
class Interval:
    """A difference of means with its confidence interval at `level`."""

    value: float
    low: float
    high: float
    level: float = LEVEL


def paired_bootstrap(
    ours: Float[ndarray, "seed item 2"],
    theirs: Float[ndarray, "seed item 2"],
    transform: Callable[[Any], Any] = lambda mean: mean,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """The difference ours - theirs of `transform(sum of totals / sum of counts)`, averaged over seeds.

    Each item is (total, count), for example the cross-entropy of a text and its number of tokens. A resample draws
    items and seeds with replacement, the same on both sides (Efron and Tibshirani, 1993, chapter 8; percentiles). With
    fewer than about five seeds the interval is too narrow. Raises UserError if the sides do not pair.
    """
    if ours.shape != theirs.shape or ours.ndim != 3 or ours.shape[-1] != 2:
        raise UserError(
            f"Items of shapes {ours.shape} and {theirs.shape} do not pair: both sides need the same seeds and items."
        )
    if not (ours[..., 1].sum(1).all() and theirs[..., 1].sum(1).all()):
        raise UserError("A training has no counted item, so that its mean is not defined.")
    generator = np.random.default_rng(seed)
    seeds = len(ours)
    # An entry that counts on neither side (a batch without labels) is not an item.
    counting = np.flatnonzero(ours[..., 1].sum(0) + theirs[..., 1].sum(0))
    ours, theirs = ours[:, counting], theirs[:, counting]
    shares = np.full(len(counting), 1 / len(counting))

    def differences(weights: Any) -> Any:
        return _means(ours, weights, transform) - _means(theirs, weights, transform)

    drawn = []
    for start in range(0, resamples, _BLOCK):
        count = min(_BLOCK, resamples - start)
        resampled = differences(generator.multinomial(len(counting), shares, count))
        drawn.append(np.take_along_axis(resampled, generator.integers(seeds, size=(count, seeds)), axis=1).mean(1))
    low, high = np.quantile(np.concatenate(drawn), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(differences(np.ones((1, len(counting)))).mean()), float(low), float(high), level)


def _means(side: Float[ndarray, "seed item 2"], weights: Any, transform: Callable[[Any], Any]) -> Any:
    """(resample, seed): the transformed mean over weighted items."""
    totals, counts = weights @ side[..., 0].T, weights @ side[..., 1].T
    return transform(totals / np.maximum(counts, 1e-12))
