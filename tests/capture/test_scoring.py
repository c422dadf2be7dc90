"""What is kept of a teacher's logits: exact outcomes, the tail's mass, and draws from it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor

from mmkd.cache.codec import TokenScores
from mmkd.capture.build_plan import ScorePlan
from mmkd.capture.scoring import score_labels, score_tokens, tail_draws
from mmkd.capture.sequences import TokenSequence, UnusableRow
from mmkd.models.heads import LMHead
from mmkd.teachers.signals import DenseSignal
from scripts.make_tiny_models import sentences
from tests.teachers.caches import plan_of, write_recipe

WIDTH = 6

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.4},
    "softcap": {"softcap": 3.0},
    "trimmed": {"trimmed_to": 40},
    "all": {"scale": 2.0, "softcap": 5.0, "trimmed_to": 40},
}


def make_signal(tokens: int, vocab: int = 50, dtype: torch.dtype = torch.float32, **head: Any) -> DenseSignal:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator) for shape in ((tokens, WIDTH), (vocab, WIDTH), (vocab,))
    )
    return DenseSignal(hidden.to(dtype), LMHead(weight.to(dtype), bias.to(dtype), **head))


def whole(signal: DenseSignal) -> Tensor:
    """All log-probs of a signal, in double precision from logits in its own type."""
    head = signal.head
    vocab = head.vocab_size
    logits = signal.hidden @ head.weight[:vocab].T
    assert head.bias is not None
    logits = (logits + head.bias[:vocab]).double() * head.scale
    if head.softcap is not None:
        logits = head.softcap * (logits / head.softcap).tanh()
    return logits.log_softmax(-1)


def offsets_of(tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(tokens)


def assert_scores_of(signal: DenseSignal, found: TokenScores, k: int, atol: float) -> None:
    log_probs = whole(signal)
    values, ids = log_probs.topk(k)
    np.testing.assert_allclose(found.log_probs, values, atol=atol)
    # Equal ids where no other token is as likely.
    clear = (log_probs.topk(k + 1).values.diff(dim=-1).abs() > 10 * atol).all(-1).numpy()
    np.testing.assert_array_equal(found.ids[clear], ids[torch.from_numpy(clear)])
    np.testing.assert_allclose(np.exp(found.tail_log_probs), 1 - values.exp().sum(-1), atol=atol)
    assert found.ids.dtype == found.draws.dtype == np.int32
    assert found.log_probs.dtype == found.tail_log_probs.dtype == np.float32


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 600])
def test_top_k_and_tail_are_those_of_the_whole_distribution(name: str, tokens: int) -> None:
    signal = make_signal(tokens, **HEADS[name])
    assert_scores_of(signal, score_tokens(signal, 5, 2, offsets_of(tokens)), 5, atol=2e-6)


def test_bf16_rounds_the_logits_and_nothing_after_them() -> None:
    """Like the live teacher, whose logits are compared in fp32 whatever they were computed in."""
    signal = make_signal(300, dtype=torch.bfloat16, softcap=9.0)
    found = score_tokens(signal, 5, 2, offsets_of(300))
    (chunk,) = signal.chunks(1000)
    exact = chunk.compare(torch.zeros(300, 50), slice(None), 1.0)[1]
    np.testing.assert_allclose(found.log_probs, exact.topk(5).values, atol=2e-6)
    np.testing.assert_allclose(np.exp(found.tail_log_probs), 1 - exact.topk(5).values.exp().sum(-1), atol=2e-6)
    assert_scores_of(signal, found, 5, atol=0.1)


def test_a_nearly_certain_teacher_has_a_small_and_finite_tail() -> None:
    for margin, expected in ((10.0, 49 * np.exp(-10)), (14.0, 49 * np.exp(-14)), (200.0, 2**-23)):
        weight = torch.zeros(50, 1)
        weight[7] = margin
        found = score_tokens(DenseSignal(torch.ones(1, 1), LMHead(weight)), 1, 0, np.zeros(1))
        assert found.ids.tolist() == [[7]]
        assert np.exp(found.tail_log_probs[0]) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("k", [0, 50])
def test_nothing_or_everything_exact(k: int) -> None:
    signal = make_signal(20)
    found = score_tokens(signal, k, 0 if k else 4, offsets_of(20))
    assert found.ids.shape == (20, k)
    if k:
        np.testing.assert_allclose(np.exp(found.log_probs).sum(1), 1, atol=1e-5)
        assert (found.tail_log_probs < -14).all()
    else:
        assert (found.tail_log_probs == 0).all()
        assert found.draws.shape == (20, 4)


def test_log_probs_of_labels() -> None:
    for settings in HEADS.values():
        signal = make_signal(600, **settings)
        labels = torch.randint(signal.head.vocab_size, (600,), generator=torch.Generator().manual_seed(1))
        expected = whole(signal).gather(-1, labels[:, None])[:, 0]
        found = score_labels(signal, labels).log_probs[:, 0]
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=5e-6)
        half = make_signal(600, dtype=torch.bfloat16, **settings)
        halved = score_labels(half, labels)
        assert halved.boundary_log_probs is None
        np.testing.assert_allclose(halved.log_probs, whole(half).gather(-1, labels[:, None]), atol=0.1)


def test_log_probs_of_a_set_of_tokens_beside_the_labels() -> None:
    for settings in HEADS.values():
        signal = make_signal(600, **settings)
        generator = torch.Generator().manual_seed(1)
        labels = torch.randint(signal.head.vocab_size, (600,), generator=generator)
        # A tokenizer may have fewer tokens than the rows that the head was trimmed from.
        mask = torch.rand(signal.head.vocab_size + 5, generator=generator) < 0.3
        found = score_labels(signal, labels, mask)
        expected = whole(signal)[:, mask[: signal.head.vocab_size]].logsumexp(-1)
        assert found.boundary_log_probs is not None
        np.testing.assert_allclose(found.boundary_log_probs, expected, atol=5e-6)
        np.testing.assert_array_equal(found.log_probs, score_labels(signal, labels).log_probs)
    assert score_labels(make_signal(0), labels[:0], mask).boundary_log_probs is not None


# Draws


def draws_by_definition(log_probs: Tensor, exact: Tensor, m: int, offset: float) -> list[int]:
    """The tokens that the tail's quantiles (offset + j) / m fall on."""
    tail = log_probs.double().exp().scatter(-1, exact, 0.0)
    ends = (tail.cumsum(-1) / tail.sum()).tolist()
    return [next(token for token, end in enumerate(ends) if end > (offset + place) / m) for place in range(m)]


@pytest.mark.parametrize("k, m", [(0, 1), (0, 7), (4, 1), (4, 9), (45, 3)])
def test_draws_are_the_quantiles_of_the_tail(k: int, m: int) -> None:
    signal = make_signal(40)
    offsets = offsets_of(40)
    found = score_tokens(signal, k, m, offsets)
    for row, log_probs in enumerate(whole(signal)):
        exact = torch.from_numpy(found.ids[row]).long()
        assert found.draws[row].tolist() == draws_by_definition(log_probs, exact, m, offsets[row])
        assert not set(found.draws[row]) & set(found.ids[row])


def test_over_all_offsets_each_token_is_drawn_as_often_as_it_is_likely() -> None:
    """A thousand offsets, evenly spaced: unbiased to within one of them, without any statistics."""
    signal, k, m, steps = make_signal(1), 4, 6, 1000
    many = DenseSignal(signal.hidden.repeat(steps, 1), signal.head)
    found = score_tokens(many, k, m, (np.arange(steps) + 0.5) / steps)
    tail = whole(signal)[0].exp().scatter(0, torch.from_numpy(found.ids[0]).long(), 0.0)
    expected = (tail / tail.sum() * m).numpy()
    counts = np.stack([np.bincount(row, minlength=50) for row in found.draws])
    np.testing.assert_allclose(counts.mean(0), expected, atol=1.01 / steps)
    # Systematic: a token is never drawn more than once too often or too seldom.
    assert (counts >= np.floor(expected)).all()
    assert (counts <= np.ceil(expected)).all()


def test_draws_depend_on_offsets_alone() -> None:
    signal = make_signal(300)
    first, again = (score_tokens(signal, 4, 5, offsets_of(300)) for _ in range(2))
    np.testing.assert_array_equal(first.draws, again.draws)
    other = score_tokens(signal, 4, 5, offsets_of(300, seed=1))
    assert (other.draws != first.draws).any()
    np.testing.assert_array_equal(other.ids, first.ids)
    alone = score_tokens(DenseSignal(signal.hidden[270:], signal.head), 4, 5, offsets_of(300)[270:])
    np.testing.assert_array_equal(alone.draws, first.draws[270:])


@pytest.mark.parametrize("offset", [0.0, 1e-30, 0.5, 1 - 1e-9, float(np.nextafter(1, 0))])
@pytest.mark.parametrize("place", [0, 25, 49])
def test_no_draw_is_an_exact_outcome_even_at_the_ends(offset: float, place: int) -> None:
    """An offset just below 1 is 1 in fp32, and the last quantile then lies behind the last token."""
    weight = torch.zeros(50, 1)
    weight[place] = 3.0
    signal = DenseSignal(torch.ones(1, 1), LMHead(weight))
    for m in (1, 4, 7):
        found = score_tokens(signal, 1, m, np.array([offset]))
        assert found.ids.tolist() == [[place]]
        assert place not in found.draws


def test_rare_tokens_of_a_large_vocabulary_are_drawn_too() -> None:
    """100,000 tokens of 1e-9 each behind a likely one: cumulative sums in fp32 would tell one of 60 of them apart."""
    rare, steps = 100_000, 50
    logits = torch.full((steps, rare + 1), float(np.log(1e-9)))
    logits[:, 0] = 0.0
    log_probs = logits.log_softmax(-1)
    probs = log_probs[0].exp().double().numpy()
    likely = probs[0] / probs.sum()
    offsets = likely + (1 - likely) * (np.arange(steps) + 0.5) / steps
    nothing = torch.zeros(steps, 0, dtype=torch.long)
    draws = tail_draws(log_probs, nothing, 1, torch.from_numpy(offsets))[:, 0].numpy()
    expected = np.searchsorted(np.cumsum(probs), offsets * probs.sum(), side="right")
    assert len(set(expected)) == steps
    assert abs(draws - expected).max() <= 1
    # Without the likely one, all are as likely as another.
    draws = tail_draws(log_probs[:1], torch.zeros(1, 1, dtype=torch.long), 4, torch.tensor([0.5]))
    assert draws.tolist() == [[1 + rare * step // 8 for step in (1, 3, 5, 7)]]


# The engine


class Scored:
    """The scores of some texts by the tiny teacher, in batches of at most so many tokens."""

    def __init__(self, plan: Any, sequences: list[TokenSequence], batch_tokens: int):
        assert isinstance(plan, ScorePlan)
        scorer: Any = plan.scorer
        scorer.batch_tokens = batch_tokens
        self.read: list[int] = []
        self.scores: list[TokenScores] = scorer.score(sequences, self.read.append)


def test_scores_do_not_depend_on_the_batch(tiny: dict[str, Path], tmp_path: Path) -> None:
    """Padding, order and company: the same outcomes, and the very same draws."""
    data = {"train": Dataset.from_dict({"text": sentences(24)})}
    plan: Any = plan_of(write_recipe(tmp_path, tiny, data, teacher_top_k=6, cache_tail_draws=5))
    sequences = [plan.prepared.splits["train"][row] for row in range(len(plan.prepared.splits["train"]))]
    together, alone = Scored(plan, sequences, 100_000), Scored(plan, sequences, 1)
    turned = Scored(plan, sequences[::-1], 60)
    assert sum(alone.read) == sum(together.read) == sum(len(sequence.ids) for sequence in sequences)
    assert (len(alone.read), len(together.read)) == (len(sequences), 1)
    for sequence, *scores in zip(sequences, together.scores, alone.scores, turned.scores[::-1], strict=True):
        first = scores[0]
        assert len(first) == sequence.supervised.sum() == len(sequence.ids) - 1
        for other in scores[1:]:
            np.testing.assert_array_equal(other.ids, first.ids)
            np.testing.assert_array_equal(other.draws, first.draws)
            np.testing.assert_allclose(other.log_probs, first.log_probs, atol=1e-5)
            np.testing.assert_allclose(other.tail_log_probs, first.tail_log_probs, atol=1e-5)


def test_rows_beyond_the_teachers_positions_are_refused_like_others(tiny: dict[str, Path], tmp_path: Path) -> None:
    data = {"train": Dataset.from_dict({"text": sentences(24)})}
    plan: Any = plan_of(write_recipe(tmp_path, tiny, data, teacher_top_k=6))
    sequences = [plan.prepared.splits["train"][row] for row in range(24)]
    everything = Scored(plan, sequences, 100).scores
    longest = sorted(len(one.ids) for one in sequences)[11]
    plan.scorer.positions = longest
    found = Scored(plan, sequences, 100).scores
    assert sum(isinstance(one, UnusableRow) for one in found) == sum(len(one.ids) > longest for one in sequences) > 0
    for sequence, before, after in zip(sequences, everything, found, strict=True):
        if isinstance(after, UnusableRow):
            assert after.reason == (
                f"It has {len(sequence.ids)} tokens, and the teacher is made for {longest} "
                "(max_position_embeddings). Lower max_length."
            )
        else:
            np.testing.assert_array_equal(after.ids, before.ids)
