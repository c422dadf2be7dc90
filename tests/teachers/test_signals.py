"""Sparse signals: with everything in them they are dense, with draws they are unbiased, and counted right."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from mmkd.cache.codec import TokenScores
from mmkd.capture.scoring import score_tokens
from mmkd.losses.divergences import forward_kl, tvd
from mmkd.losses.fused import Objective, fused_loss
from mmkd.methods.kd import DIVERGENCES, KDConfig
from mmkd.methods.taid import TAIDTrainer
from mmkd.models.heads import LMHead
from mmkd.teachers.batch import ONLY, View
from mmkd.teachers.cached import CachedTeacher, _with_draws
from mmkd.teachers.signals import DenseSignal, SparseSignal, TopKSignal

TOKENS, VOCAB, WIDTH = 9, 40, 8

SETTINGS = cast(KDConfig, SimpleNamespace(beta=0.3, skew=0.1, mu=0.5, bild_top_k=4, dbild_max_k=8))
TAID = cast(Any, SimpleNamespace(schedule=SimpleNamespace(t=0.4), args=SimpleNamespace(progress_measure="kl")))
OBJECTIVES: dict[str, Objective] = {name: build(SETTINGS) for name, build in DIVERGENCES.items()}
OBJECTIVES["taid"] = lambda student, teacher: TAIDTrainer._objective(TAID, student, teacher)
each_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=list(OBJECTIVES))


class Pair:
    """A student and a teacher of the same tokens, in double precision."""

    def __init__(self, tokens: int = TOKENS, vocab: int = VOCAB, seed: int = 0, scale: float = 1.0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden = normal(tokens, WIDTH).requires_grad_()
        self.head = LMHead(normal(vocab, WIDTH).mul_(0.5).requires_grad_())
        self.labels = torch.randint(vocab, (tokens,), generator=generator)
        self.dense = DenseSignal(normal(tokens, WIDTH), LMHead(normal(vocab, WIDTH).mul_(scale)))
        self.offsets = torch.rand(tokens, generator=generator, dtype=torch.float64).numpy()

    def repeated(self, times: int) -> "Pair":
        """Every token many times, each with other draws."""
        pair = Pair()
        pair.hidden = self.hidden.detach().repeat(times, 1).requires_grad_()
        pair.head, pair.labels = self.head, self.labels.repeat(times)
        pair.dense = DenseSignal(self.dense.hidden.repeat(times, 1), self.dense.head)
        pair.offsets = np.random.default_rng(1).random(len(pair.labels))
        return pair

    def scores(self, k: int, m: int = 0) -> TokenScores:
        return score_tokens(self.dense, k, m, self.offsets)

    def loss(self, signal: Any, objective: Objective = forward_kl, **settings: Any) -> tuple[Tensor, list[Tensor]]:
        """The loss and its gradients by hidden states and head."""
        total = fused_loss(self.hidden, self.head, self.labels, signal, objective, **settings).total
        return total.detach(), list(torch.autograd.grad(total, [self.hidden, self.head.weight]))


def signal_of(scores: TokenScores, tail: str) -> SparseSignal:
    """What a cached teacher makes of its scores."""
    teacher = teacher_with(tail)
    supervised = torch.ones(len(scores), dtype=torch.bool)
    signal = teacher.ask(View({}, torch.zeros(1, 1), targets={ONLY: teacher.tensors([scores])}), supervised)
    assert isinstance(signal, SparseSignal)
    return signal


def teacher_with(tail: str) -> CachedTeacher:
    """A cached teacher without a cache: it makes signals of scores that it is given."""
    teacher = object.__new__(CachedTeacher)
    teacher.tail, teacher.states = tail, None
    teacher.signal_type = TopKSignal if tail == "bucket" else SparseSignal
    return teacher


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def assert_same(actual: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]], rtol: float) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=rtol, atol=1e-5)
    for ours, theirs in zip(actual[1], expected[1], strict=True):
        assert relative_error(ours, theirs) < rtol


# The whole distribution


@each_objective
def test_top_k_of_the_whole_vocabulary_is_dense(objective: Objective) -> None:
    pair = Pair()
    expected = pair.loss(pair.dense, objective)
    assert_same(pair.loss(signal_of(pair.scores(VOCAB), "bucket"), objective), expected, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_renormalised_whole_vocabulary_is_dense_at_any_temperature(temperature: float) -> None:
    pair = Pair()
    expected = pair.loss(pair.dense, temperature=temperature)
    assert_same(pair.loss(signal_of(pair.scores(VOCAB), "renormalise"), temperature=temperature), expected, rtol=1e-5)


@each_objective
@pytest.mark.parametrize("k", [1, 5, VOCAB - 1, VOCAB])
def test_a_student_that_is_the_teacher_has_no_loss(objective: Objective, k: int) -> None:
    pair = Pair()
    pair.dense = DenseSignal(pair.hidden.detach(), pair.head.frozen())
    loss, gradients = pair.loss(signal_of(pair.scores(k), "bucket"), objective)
    assert loss.abs() < 1e-4
    # An absolute value has no derivative at 0, and rounding decides which one is taken.
    if objective is not tvd:
        assert max(gradient.abs().max() for gradient in gradients) < 1e-3


def test_a_larger_top_k_is_nearer_to_the_whole() -> None:
    pair = Pair(tokens=200)
    _, (_, expected) = pair.loss(pair.dense)
    errors = [relative_error(pair.loss(signal_of(pair.scores(k), "bucket"))[1][1], expected) for k in (1, 4, 16, 40)]
    assert errors == sorted(errors, reverse=True)


# Unbiased


@pytest.mark.parametrize("k, m", [(0, 8), (3, 1), (3, 5), (8, 8)])
def test_draws_give_the_gradient_of_the_whole_distribution_on_average(k: int, m: int) -> None:
    """The same tokens 4,000 times: the error falls with the root of that, while a top-k keeps its bias."""
    pair = Pair()
    times = 4000
    many = pair.repeated(times)
    _, (by_hidden, by_head) = pair.loss(pair.dense)
    _, (hidden, head) = many.loss(signal_of(many.scores(k, m), "unbiased"))
    assert relative_error(head / times, by_head) < 0.02
    assert relative_error(hidden.reshape(times, TOKENS, WIDTH).mean(0), by_hidden) < 0.02
    if k:
        _, (_, renormalised) = pair.loss(signal_of(pair.scores(k), "renormalise"))
        assert relative_error(renormalised, by_head) > 0.1


def test_expected_probabilities_are_the_teachers() -> None:
    """Each token's own share, within five of the standard errors that systematic draws have."""
    pair, times, k, m = Pair(), 4000, 4, 6
    many = pair.repeated(times)
    signal = signal_of(many.scores(k, m), "unbiased")
    given = torch.zeros(len(many.labels), VOCAB, dtype=torch.float64)
    given.scatter_add_(1, signal.ids.long(), signal.log_probs.double().exp())
    given = given.reshape(times, TOKENS, VOCAB)
    expected = pair.dense.head.log_probs(pair.dense.hidden).exp()
    tail = 1 - expected.topk(k).values.sum(-1, keepdim=True)
    # A token of share s is drawn floor(s m) times or once more.
    drawn = expected / tail * m
    spread = ((drawn - drawn.floor()) * (drawn.ceil() - drawn)).sqrt() * tail / m / times**0.5
    assert ((given.mean(0) - expected).abs() <= 5 * spread + 2 * tail / m / times).all()
    torch.testing.assert_close(given.sum(-1), torch.ones(times, TOKENS, dtype=torch.float64), rtol=0, atol=1e-5)


def test_unbiased_targets_improve_with_the_batch_and_renormalised_ones_do_not() -> None:
    """At the same number of outcomes per token."""
    pair = Pair(vocab=200, scale=0.3)
    _, (_, expected) = pair.loss(pair.dense)
    errors: dict[str, list[float]] = {"unbiased": [], "renormalise": []}
    for times in (4, 400):
        many = pair.repeated(times)
        for tail, k, m in (("unbiased", 8, 8), ("renormalise", 16, 0)):
            _, (_, gradient) = many.loss(signal_of(many.scores(k, m), tail))
            errors[tail].append(relative_error(gradient / times, expected))
    assert errors["unbiased"][1] < 0.2 * errors["unbiased"][0]
    assert errors["renormalise"][1] == pytest.approx(errors["renormalise"][0])
    assert errors["unbiased"][1] < 0.2 * errors["renormalise"][1]


def test_without_a_tail_to_speak_of_draws_change_nothing() -> None:
    pair = Pair(scale=30.0)
    exact = pair.loss(signal_of(pair.scores(20), "renormalise"))
    assert_same(pair.loss(signal_of(pair.scores(20, 5), "unbiased")), exact, rtol=1e-5)


# Counting draws


def scores_with(draws: list[list[int]], k: int = 1, tail: float = 0.5) -> TokenScores:
    """k exact outcomes (ids from 90) that share what the tail leaves."""
    tokens = len(draws)
    ids = np.tile(np.arange(90, 90 + k, dtype=np.int32), (tokens, 1))
    log_probs = np.full((tokens, k), np.log((1 - tail) / max(k, 1)), dtype=np.float32)
    tails = np.full(tokens, np.log(tail), dtype=np.float32)
    return TokenScores(ids, log_probs, np.array(draws, dtype=np.int32).reshape(tokens, -1), tails)


@pytest.mark.parametrize("k", [0, 1, 3])
def test_equal_draws_count_once_with_their_shares_together(k: int) -> None:
    draws = [[7, 7, 3, 9], [5, 5, 5, 5], [1, 2, 3, 4], [8, 2, 2, 2], [4, 4, 6, 6]]
    ids, log_probs = _with_draws(scores_with(draws, k, tail=0.4 if k else 1.0))
    assert ids.shape == log_probs.shape == (5, k + 4)
    assert log_probs.dtype == np.float32
    for row, drawn in enumerate(draws):
        found: dict[int, float] = {}
        for token, log_prob in zip(ids[row, k:].tolist(), log_probs[row, k:].tolist(), strict=True):
            assert token not in found or log_prob == -np.inf
            found[token] = found.get(token, 0.0) + np.exp(log_prob)
        share = (0.4 if k else 1.0) / 4
        assert found == pytest.approx({token: share * drawn.count(token) for token in drawn})
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=1), 1, atol=1e-6)


def test_one_draw_and_no_token() -> None:
    ids, log_probs = _with_draws(scores_with([[7]], k=2, tail=0.25))
    assert ids.tolist() == [[90, 91, 7]]
    np.testing.assert_allclose(np.exp(log_probs), [[0.375, 0.375, 0.25]], rtol=1e-6)
    none = scores_with([[7]], k=2)
    ids, log_probs = _with_draws(
        TokenScores(none.ids[:0], none.log_probs[:0], none.draws[:0], none.tail_log_probs[:0])
    )
    assert ids.shape == log_probs.shape == (0, 3)


def test_sequences_of_a_batch_are_joined_in_order() -> None:
    parts = [scores_with([[7, 7]]), scores_with([[1, 2], [3, 3]]), scores_with([[4, 5]])]
    for tail in ("bucket", "unbiased", "renormalise"):
        fields = teacher_with(tail).tensors(parts)
        alone = [teacher_with(tail).tensors([part]) for part in parts]
        for name, tensor in fields.items():
            assert torch.equal(tensor, torch.cat([one[name] for one in alone]))
            assert len(tensor) == 4


def test_the_most_likely_token_is_never_a_draw() -> None:
    """Draws that stand for a wide tail may weigh more than the likeliest token, and are not likely for that."""
    signal = signal_of(scores_with([[7, 7, 7, 8]], k=2, tail=0.9), "unbiased")
    assert signal.top1(slice(0, 1)).tolist() == [90]


# What the student is compared on


def by_hand(pair: Pair, scores: TokenScores, temperature: float) -> Tensor:
    """T^2 KL(tempered and renormalised top-k || student at T on the whole vocabulary), summed."""
    logits = pair.hidden @ pair.head.weight.T
    student = (logits / temperature).log_softmax(-1).gather(-1, torch.from_numpy(scores.ids).long())
    teacher = (torch.from_numpy(scores.log_probs).double() / temperature).log_softmax(-1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum()


@pytest.mark.parametrize("k", [1, 5, 39])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_renormalised_targets_are_tempered_as_by_hand(k: int, temperature: float) -> None:
    pair = Pair()
    scores = pair.scores(k)
    total = by_hand(pair, scores, temperature)
    expected = total.detach(), list(torch.autograd.grad(total, [pair.hidden, pair.head.weight]))
    assert_same(pair.loss(signal_of(scores, "renormalise"), temperature=temperature), expected, rtol=1e-6)


@pytest.mark.parametrize("tail", ["bucket", "unbiased", "renormalise"])
def test_chunks_change_nothing(tail: str) -> None:
    pair = Pair()
    signal = signal_of(pair.scores(4, 3), tail)
    expected = pair.loss(signal, chunk_size=100, diagnostics=True)
    for chunk_size in (1, 4):
        assert_same(pair.loss(signal, chunk_size=chunk_size, diagnostics=True), expected, rtol=1e-12)


@pytest.mark.parametrize("tail", ["bucket", "unbiased", "renormalise"])
def test_no_tokens_are_a_loss_of_zero(tail: str) -> None:
    pair = Pair(tokens=0)
    nothing = TokenScores(*(part[:0] for part in vars(scores_with([[7, 7]], k=2)).values() if part is not None))
    loss, gradients = pair.loss(signal_of(nothing, tail), diagnostics=True)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients)


def test_probabilities_of_zero_are_finite() -> None:
    pair = Pair(tokens=2)
    ids, tails = np.array([[1, 2], [3, 4]], dtype=np.int32), np.full(2, -np.inf, dtype=np.float32)
    certain = TokenScores(ids, np.array([[0, -np.inf], [0, -np.inf]], np.float32), ids, tails)
    for tail in ("bucket", "unbiased", "renormalise"):
        loss, gradients = pair.loss(signal_of(certain, tail))
        assert loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients)
