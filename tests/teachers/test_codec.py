"""Scores as bytes: ids and draws come back exactly, log-probs within a fidelity that is stated here."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkd.cache.codec import Codec, TokenOrder, TokenScores
from tests.teachers.caches import random_scores

VOCABULARIES = [1, 200, 256, 257, 49_152, 65_536, 65_537, 151_936, 262_144]
FIDELITY = 2e-4
"""Nats of KL that the encoding may cost, on average (PERFORMANCE.md, B4)."""


def order_of(vocab: int, seed: int = 0) -> TokenOrder:
    return TokenOrder(np.random.default_rng(seed).permutation(vocab).astype(np.int32))


def top_k(log_probs: np.ndarray, k: int) -> TokenScores:
    """The k most likely tokens of whole distributions, with what fp32 makes of their tail."""
    ids = np.argsort(-log_probs, axis=1, kind="stable")[:, :k]
    exact = np.take_along_axis(log_probs, ids, axis=1).astype(np.float32)
    mass = np.minimum(np.exp(exact, dtype=np.float32).sum(axis=1, dtype=np.float32), 1 - np.float32(2**-23))
    return TokenScores(ids.astype(np.int32), exact, np.zeros((len(ids), 0), dtype=np.int32), np.log1p(-mass))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def outcomes(scores: TokenScores) -> np.ndarray:
    """The log-probs of a top-k and its tail, in double precision."""
    return np.concatenate([scores.log_probs, scores.tail_log_probs[:, None]], axis=1).astype(np.float64)


def encoding_error(codec: Codec, scores: TokenScores) -> np.ndarray:
    """KL(what was said || what is read back) per token, in nats."""
    log_p, log_q = outcomes(scores), outcomes(codec.decode(codec.encode(scores), len(scores)))
    log_p = log_p - np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    with np.errstate(invalid="ignore"):
        return np.where(np.exp(log_p) > 0, np.exp(log_p) * (log_p - log_q), 0.0).sum(axis=1)


def assert_exact(codec: Codec, scores: TokenScores) -> TokenScores:
    """Ids come back in their order and draws as a multiset, each outcome once; the decoded masses sum to 1."""
    found = codec.decode(codec.encode(scores), len(scores))
    np.testing.assert_array_equal(found.ids, scores.ids)
    np.testing.assert_array_equal(np.sort(found.draws, axis=1), np.sort(scores.draws, axis=1))
    assert found.log_probs.shape == scores.log_probs.shape
    assert found.log_probs.dtype == found.tail_log_probs.dtype == np.float32
    assert np.isfinite(outcomes(found)).all()
    np.testing.assert_allclose(np.exp(outcomes(found)).sum(axis=1), 1, rtol=0, atol=2e-6)
    return found


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("k, m", [(1, 0), (4, 0), (0, 1), (0, 5), (3, 4)])
def test_ids_and_draws_come_back_exactly(vocab: int, k: int, m: int) -> None:
    if k + m > vocab:
        k, m = min(k, vocab), 0 if k else min(m, vocab)
    codec = Codec("top_k", k, m, order_of(vocab))
    assert_exact(codec, random_scores(vocab, k, m))


@pytest.mark.parametrize("vocab", [1, 2, 200, 256, 257])
def test_the_whole_vocabulary_comes_back(vocab: int) -> None:
    assert_exact(Codec("top_k", vocab, 0, order_of(vocab)), random_scores(vocab, vocab, 0))


def test_masses_of_a_whole_large_vocabulary_sum_to_one() -> None:
    """Sums of 150,000 small numbers in fp32 are off by 1e-4 and more."""
    logits = np.random.default_rng(0).normal(scale=3, size=(2, 151_936))
    assert_exact(Codec("top_k", 151_936, 0, order_of(151_936)), top_k(log_softmax(logits), 151_936))


@pytest.mark.parametrize("k, m", [(4, 0), (0, 3), (4, 3)])
@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_sequences_of_hardly_any_tokens(k: int, m: int, tokens: int) -> None:
    codec = Codec("top_k", k, m, order_of(300))
    assert len(assert_exact(codec, random_scores(300, k, m, tokens))) == tokens


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70_000), st.integers(0, 6), st.integers(0, 6), st.integers(0, 9), st.integers(0, 99))
def test_any_scores_come_back(vocab: int, k: int, m: int, tokens: int, seed: int) -> None:
    k, m = min(k, vocab), min(m, max(0, vocab - k))
    if k + m:
        assert_exact(Codec("top_k", k, m, order_of(vocab, seed)), random_scores(vocab, k, m, tokens, seed))


def test_equal_draws_stand_side_by_side() -> None:
    """What `CachedTeacher` relies on to count them."""
    codec = Codec("top_k", 0, 5, order_of(300))
    draws = np.array([[7, 299, 7, 0, 7], [1, 2, 1, 2, 1]], dtype=np.int32)
    scores = TokenScores(np.zeros((2, 0), np.int32), np.zeros((2, 0), np.float32), draws, np.zeros(2, np.float32))
    for row in codec.decode(codec.encode(scores), 2).draws.tolist():
        runs = [value for place, value in enumerate(row) if place == 0 or row[place - 1] != value]
        assert len(runs) == len(set(row))


# Fidelity


@pytest.mark.parametrize("k", [1, 8, 64])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 30.0])
def test_encoding_costs_little(scale: float, k: int) -> None:
    """From uniform over a mean entropy of 3 nats (scale 3) to nearly certain."""
    logits = np.random.default_rng(k).normal(scale=scale, size=(300, 3000))
    assert encoding_error(Codec("top_k", k, 0, order_of(3000)), top_k(log_softmax(logits), k)).mean() <= FIDELITY


def test_a_flat_whole_vocabulary_costs_more_but_not_much() -> None:
    """Steps are wide where probabilities are small: with k = V of a flat distribution, all of them are."""
    logits = np.random.default_rng(0).normal(size=(20, 3000))
    assert encoding_error(Codec("top_k", 3000, 0, order_of(3000)), top_k(log_softmax(logits), 3000)).mean() < 7e-4


EXTREMES = {
    "certain": [0.0, -np.inf, -np.inf, -np.inf],
    "all but certain": [-1e-7, -16.5, -18.0, -19.0],
    "a step below certain": [np.log1p(-0.006), np.log(0.003), np.log(0.002), np.log(0.001)],
    "two halves": [np.log(0.5), np.log(0.5), -np.inf, -np.inf],
    "uniform": [np.log(0.25)] * 4,
    "mostly tail": [-14.0, -15.0, -16.0, -17.0],
    "beyond the floor": [-1e-9, -30.0, -80.0, -1000.0],
    "above one by rounding": [np.log(0.7) + 3e-7, np.log(0.2), np.log(0.1) + 3e-7, -20.0],
    "positive": [3e-7, -16.0, -17.0, -18.0],
}


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_extreme_distributions(name: str, k: int) -> None:
    codec = Codec("top_k", k, 0, order_of(50))
    log_probs = np.full((2, 50), -np.inf)
    log_probs[:, :4] = EXTREMES[name]
    found = assert_exact(codec, scores := top_k(log_probs, k))
    assert encoding_error(codec, scores).max() <= FIDELITY
    # Nothing is moved by more than half a step, as far as anything depends on it.
    mass = np.exp(outcomes(scores))
    np.testing.assert_allclose(np.exp(outcomes(found)), mass / mass.sum(axis=1, keepdims=True), atol=0.012)


def test_likelier_tokens_stay_likelier() -> None:
    logits = np.random.default_rng(0).normal(scale=3, size=(100, 500))
    codec = Codec("top_k", 64, 0, order_of(500))
    found = codec.decode(codec.encode(top_k(log_softmax(logits), 64)), 100)
    assert (np.diff(found.log_probs, axis=1) <= 0).all()


def test_log_probs_of_single_tokens() -> None:
    codec = Codec("log_probs", 1, 0, TokenOrder(np.zeros(0, dtype=np.int32)))
    values = np.array([0.0, -1e-4, -0.01, -1.0, -12.345, -300.0, -np.inf], dtype=np.float32)[:, None]
    nothing = np.zeros((len(values), 0), dtype=np.int32)
    given = TokenScores(nothing, values, nothing, np.full(len(values), -np.inf, dtype=np.float32))
    found = codec.decode(codec.encode(given), len(values))
    np.testing.assert_allclose(found.log_probs, values, rtol=2**-11)
    assert found.ids.shape == found.draws.shape == (len(values), 0)
    assert np.isneginf(found.tail_log_probs).all()
    assert len(codec.decode(codec.encode(TokenScores(nothing[:0], values[:0], nothing[:0], values[:0, 0])), 0)) == 0


def test_log_probs_with_those_of_new_words() -> None:
    order = TokenOrder(np.zeros(0, dtype=np.int32))
    alone, both = Codec("log_probs", 1, 0, order), Codec("log_probs", 1, 0, order, boundaries=True)
    values = np.random.default_rng(0).exponential(size=(2, 9)).astype(np.float32) * -1
    given = TokenScores.of_labels(*values)
    found = both.decode(both.encode(given), 9)
    assert found.boundary_log_probs is not None
    np.testing.assert_allclose(found.log_probs[:, 0], values[0], rtol=2**-11)
    np.testing.assert_allclose(found.boundary_log_probs, values[1], rtol=2**-11)
    # Without them, the bytes are those that they have always been.
    assert alone.encode(given) == alone.encode(TokenScores.of_labels(values[0]))
    assert alone.decode(alone.encode(given), 9).boundary_log_probs is None
    with pytest.raises((struct.error, ValueError, OSError)):
        both.decode(alone.encode(given), 9)
    parts = given.split([4, 0, 5])
    np.testing.assert_array_equal(parts[2].boundary_log_probs, values[1, 4:])
    assert [len(part) for part in parts] == [4, 0, 5]


# Bytes


def test_bytes_depend_on_the_values_alone() -> None:
    codec, scores = Codec("top_k", 8, 6, order_of(70_000)), random_scores(70_000, 8, 6, tokens=50)
    blob = codec.encode(scores)
    shuffled = np.random.default_rng(1).permuted(scores.draws, axis=1)
    wide = TokenScores(
        np.asfortranarray(scores.ids), scores.log_probs[:, ::1].astype(np.float64), shuffled, scores.tail_log_probs
    )
    assert codec.encode(scores) == codec.encode(wide) == Codec("top_k", 8, 6, order_of(70_000)).encode(scores) == blob
    found = codec.decode(memoryview(b"before" + blob + b"behind")[6 : 6 + len(blob)], 50)
    np.testing.assert_array_equal(found.ids, scores.ids)


def test_frequent_tokens_cost_less() -> None:
    """200 of 50,000 tokens in use: as ranks, their high bytes are zeros and compress away."""
    vocab, used = 50_000, np.random.default_rng(0).permutation(50_000)[:200]
    whole = random_scores(200, 32, 0, tokens=200)
    scores = TokenScores(used[whole.ids].astype(np.int32), whole.log_probs, whole.draws, whole.tail_log_probs)
    by_frequency = TokenOrder.of(np.bincount(scores.ids.ravel(), minlength=vocab))
    sizes = [len(Codec("top_k", 32, 0, order).encode(scores)) for order in (by_frequency, order_of(vocab, seed=1))]
    assert sizes[0] < 0.8 * sizes[1]


def test_token_order_is_by_count_then_by_id() -> None:
    order = TokenOrder.of(np.array([3, 9, 3, 0, 9]))
    assert order.ids.tolist() == [1, 4, 0, 2, 3]
    assert order.ranks[order.ids].tolist() == list(range(5))


@pytest.mark.parametrize("kind, k, m", [("top_k", 4, 3), ("log_probs", 1, 0)])
def test_blobs_that_are_cut_short_never_decode(kind: str, k: int, m: int) -> None:
    codec, scores = Codec(kind, k, m, order_of(300)), random_scores(300, k, m, tokens=20)
    blob = codec.encode(scores)
    for length in range(len(blob)):
        with pytest.raises((struct.error, ValueError, OSError)):
            codec.decode(blob[:length], 20)
    for tokens in (0, 19, 21, 40):
        with pytest.raises((struct.error, ValueError, OSError)):
            codec.decode(blob, tokens)
