"""Paired bootstrap: zero for equals, right for known differences, narrower where sides move together."""

import numpy as np
import pytest

from mmkd.eval.bootstrap import paired_bootstrap


def items(values: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """(seed, item, 2) of per-item totals and counts."""
    return np.stack([values, np.ones_like(values) if counts is None else counts], -1)


def test_equal_trainings_differ_by_nothing():
    values = items(np.random.default_rng(0).normal(size=(3, 40)))
    found = paired_bootstrap(values, values)
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_the_interval_is_that_of_the_normal_approximation():
    generator = np.random.default_rng(1)
    base = generator.normal(0, 5, size=(1, 400))
    better = base + generator.normal(0.5, 1, size=(1, 400))
    found = paired_bootstrap(items(better), items(base))
    difference = better - base
    error = 1.96 * difference.std(ddof=1) / 20
    assert found.value == pytest.approx(difference.mean())
    assert found.low == pytest.approx(difference.mean() - error, abs=0.02)
    assert found.high == pytest.approx(difference.mean() + error, abs=0.02)
    # Unpaired, the spread of the items themselves would hide it.
    shuffled = paired_bootstrap(items(generator.permutation(better[0])[None]), items(base))
    assert shuffled.high - shuffled.low > 3 * (found.high - found.low)


def test_means_are_weighted_by_counts_and_transformed_per_seed():
    totals, counts = np.array([[2.0, 6.0], [1.0, 1.0]]), np.array([[1.0, 3.0], [1.0, 1.0]])
    zero = items(np.zeros((2, 2)), counts)
    found = paired_bootstrap(items(totals, counts), zero, np.exp)
    assert found.value == pytest.approx((np.exp(8 / 4) + np.exp(1)) / 2 - 1)


def test_seeds_that_disagree_widen_the_interval():
    same = np.zeros((2, 200))
    apart = same + np.array([[0.0], [2.0]])
    found = paired_bootstrap(items(apart), items(same))
    assert (found.low, found.value, found.high) == (0, 1, 2)


def test_what_counts_nowhere_is_no_item():
    values, counts = np.array([[1.0, 0.0, 3.0]]), np.array([[1.0, 0.0, 1.0]])
    found = paired_bootstrap(items(values, counts), items(np.zeros((1, 3)), counts))
    assert found.value == 2
    assert 1 <= found.low <= found.high <= 3


def test_sides_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="do not pair"):
        paired_bootstrap(items(np.zeros((1, 3))), items(np.zeros((1, 4))))
    with pytest.raises(ValueError, match="no counted item"):
        paired_bootstrap(items(np.zeros((1, 3)), np.zeros((1, 3))), items(np.zeros((1, 3))))
