"""The reverse KL from sampled tokens: estimators, their gradients, and what reference implementations compute."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmkd.losses.divergences import forward_kl, jsd, reverse_kl, skew_kl, skew_reverse_kl
from mmkd.losses.fused import Objective, fused_loss
from mmkd.losses.narrowed import SampledTargets, StudentTopK
from mmkd.losses.sampled_kl import policy_gradient, prefix_importance, sampled_kl
from mmkd.models.heads import LMHead
from mmkd.teachers.signals import DenseSignal, SparseSignal
from tests.losses.test_fused import TOKENS, VOCAB, Case, assert_same, dense_logits, make_case

ARRAYS: dict[str, np.ndarray] = dict(np.load(Path(__file__).parents[1] / "golden" / "OPD_losses.npz"))
MASK, SAMPLED = torch.from_numpy(ARRAYS["mask"]), torch.from_numpy(ARRAYS["tokens"])
TEACHER = torch.from_numpy(ARRAYS["teacher"]).log_softmax(-1)
OLD = torch.from_numpy(ARRAYS["old_log_probs"])


def student_logits() -> Tensor:
    return torch.from_numpy(ARRAYS["student"]).requires_grad_()


def of_tokens(log_probs: Tensor) -> Tensor:
    return log_probs.gather(-1, SAMPLED[..., None])[..., 0]


def assert_gradient(name: str, total: Tensor, logits: Tensor, scale: float = 1.0) -> None:
    gradient = torch.autograd.grad(total.sum(), logits, retain_graph=True)[0] / scale
    torch.testing.assert_close(gradient, torch.from_numpy(ARRAYS[f"{name}__grad"]), rtol=1e-6, atol=1e-8)


def assert_golden(name: str, loss: Tensor, logits: Tensor, scale: float = 1.0) -> None:
    """A loss per token, or their sum over the answers, with the gradient of that sum, as it was recorded."""
    total = (loss * MASK).sum() if loss.shape == MASK.shape else loss.sum()
    expected = torch.from_numpy(ARRAYS[name])
    actual = loss if expected.shape == loss.shape else total
    torch.testing.assert_close(actual.detach() / scale, expected)
    assert_gradient(name, total, logits, scale)


# Estimators


def toy(states: int = 4, tokens: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(states, tokens, generator=generator, dtype=torch.float64)
    teacher = torch.randn(states, tokens, generator=generator, dtype=torch.float64).log_softmax(-1)
    return logits.requires_grad_(), teacher


def sampled_gradients(draws: int, loss: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard error of the gradient by the logits over that many tokens drawn at each state."""
    logits, teacher = toy()
    generator = torch.Generator().manual_seed(3)
    tokens = torch.multinomial(logits.detach().softmax(-1), draws, replacement=True, generator=generator)
    # One leaf per draw, since gradients of a sum would be added up.
    leaves = logits.detach()[:, None].expand(-1, draws, -1).clone().requires_grad_()
    log_q = leaves.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    log_p = teacher.gather(-1, tokens)
    gradients = torch.autograd.grad(loss(log_q, log_p).sum(), leaves)[0]
    return gradients.mean(1), gradients.std(1) / math.sqrt(draws)


def exact_gradient(divergence: Any) -> Tensor:
    logits, teacher = toy()
    return torch.autograd.grad(divergence(logits.log_softmax(-1), teacher).sum(), logits)[0]


@pytest.mark.parametrize("baseline", [0.0, 0.7], ids=["none", "baseline"])
def test_mean_of_the_policy_gradient_is_the_gradient_of_the_reverse_kl(baseline: float) -> None:
    mean, error = sampled_gradients(20_000, lambda q, p: policy_gradient(q, p, baseline=baseline)[0])
    z = (mean - exact_gradient(reverse_kl)) / error
    # 24 numbers that are standard normal: all of them below 4 but for one run in 700.
    assert z.abs().max() < 4
    assert 0.3 < z.square().mean() < 2.5


def test_differentiating_an_estimator_itself_gives_another_gradient() -> None:
    mean, error = sampled_gradients(20_000, lambda q, p: sampled_kl(q, p, "k3"))
    assert ((mean - exact_gradient(forward_kl)) / error).abs().max() < 4.5
    assert ((mean - exact_gradient(reverse_kl)) / error).abs().max() > 20
    nothing, error = sampled_gradients(20_000, lambda q, p: sampled_kl(q, p, "k1"))
    assert (nothing / error).abs().max() < 4


def test_importance_ratios_undo_that_another_student_sampled() -> None:
    logits, teacher = toy()
    older = (logits.detach() + 0.3 * teacher).log_softmax(-1)
    # The mean over all of the older student's tokens, exactly.
    log_q = logits.log_softmax(-1)
    loss, clipped = policy_gradient(log_q, teacher, older)
    mean = torch.autograd.grad((older.exp() * loss).sum(), logits)[0]
    torch.testing.assert_close(mean, exact_gradient(reverse_kl))
    assert not clipped.any()


def test_a_baseline_lowers_the_variance() -> None:
    logits, teacher = toy()
    kl = reverse_kl(logits.log_softmax(-1), teacher).mean().item()
    plain = sampled_gradients(20_000, lambda q, p: policy_gradient(q, p)[0])[1]
    against_mean = sampled_gradients(20_000, lambda q, p: policy_gradient(q, p, baseline=kl)[0])[1]
    assert against_mean.square().sum() < plain.square().sum()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_mean_of_an_estimator_is_the_reverse_kl(estimator: str) -> None:
    logits, teacher = toy()
    log_q = logits.detach().log_softmax(-1)
    mean = (log_q.exp() * sampled_kl(log_q, teacher, estimator)).sum(-1)
    torch.testing.assert_close(mean, reverse_kl(log_q, teacher))


def test_k3_is_never_negative_and_never_overflows() -> None:
    grid = torch.linspace(-90, 0, 181)
    values = sampled_kl(grid[:, None], grid[None], "k3")
    assert (values >= 0).all()
    assert values.isfinite().all()
    assert (sampled_kl(grid, grid, "k3") == 0).all()


def test_a_ratio_beyond_the_clip_is_pushed_no_further() -> None:
    old, better = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-0.1, -3.0, -0.1])
    student = torch.tensor([-0.5, -0.5, -1.5], requires_grad=True)
    loss, clipped = policy_gradient(student, better, old, clip_ratio=0.2)
    gradient = torch.autograd.grad(loss.sum(), student)[0]
    # Likelier by 1.65 already and to become likelier: no more. Likelier, and to become less so: as without a clip.
    assert clipped.tolist() == [True, False, False]
    assert gradient[0] == 0
    assert gradient[1] > 0 > gradient[2]


# Weights


def test_importance_falls_from_one_plus_gamma_as_an_answer_strays() -> None:
    gaps = torch.tensor([1.0, -3.0, 0.0, 4.0, 2.0, 2.0])
    answers = torch.tensor([0, 0, 0, 0, 1, 1])
    weights = prefix_importance(gaps, answers, 0.5)
    torch.testing.assert_close(weights, torch.tensor([1.5, 1.4375, 1.25, 1.25, 1.5, 1.25]))
    torch.testing.assert_close(prefix_importance(gaps[4:], answers[4:] - 1, 0.5), weights[4:])
    assert prefix_importance(torch.zeros(3), torch.tensor([0, 0, 1])).tolist() == [1.5, 1.5, 1.5]
    assert len(prefix_importance(torch.zeros(0), torch.zeros(0, dtype=torch.long))) == 0


# In the fused loss


def policy(log_q: Tensor, known: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    sampling = known[:, 1] if known.shape[1] > 1 else None
    return policy_gradient(log_q[:, 0], known[:, 0], sampling)[0], {}


def dense_policy(case: Case, sampling: Tensor | None) -> Tensor:
    student, teacher = dense_logits(case.hidden, case.head), dense_logits(case.teacher.hidden, case.teacher.head)
    log_q, log_p = (part.log_softmax(-1).gather(-1, case.labels[:, None])[:, 0] for part in (student, teacher))
    return policy_gradient(log_q, log_p, sampling)[0].sum()


@pytest.mark.parametrize("told", [False, True], ids=["distributions", "log_probs"])
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
@pytest.mark.parametrize("stale", [False, True])
def test_sampled_tokens_in_chunks_are_those_of_dense_logits(told: bool, chunk_size: int, stale: bool) -> None:
    case = make_case(bias=True, softcap=5.0)
    teacher = dense_logits(case.teacher.hidden, case.teacher.head).log_softmax(-1)
    old = torch.linspace(-4, -1, TOKENS, dtype=torch.float64) if stale else None
    of_labels = teacher.gather(-1, case.labels[:, None])[:, 0]
    targets = SampledTargets(
        case.labels, of_labels if told else None, None if told else case.teacher, sampling_log_probs=old
    )
    loss = fused_loss(case.hidden, case.head, case.labels, targets, policy, chunk_size=chunk_size, diagnostics=True)
    assert_same(loss.total, dense_policy(case, old), case.leaves)
    # What is reported is about whole distributions, where these are known.
    plain = fused_loss(case.hidden, case.head, case.labels, case.teacher, forward_kl, diagnostics=True).sums
    known = {"ce", "token_accuracy", "student_entropy"} | (set() if told else {"kl", "top1_agreement"})
    for name in known:
        torch.testing.assert_close(loss.sums[name], plain[name])
    assert ("kl" in loss.sums) is not told


@pytest.mark.parametrize("divergence", [reverse_kl, forward_kl, jsd], ids=["reverse", "forward", "jsd"])
@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_the_students_top_k_is_that_of_dense_logits(divergence: Objective, chunk_size: int) -> None:
    case, k = make_case(bias=True), 4
    student, teacher = (dense_logits(side.hidden, side.head).log_softmax(-1) for side in (case, case.teacher))
    ids = student.detach().topk(k).indices
    rest = torch.ones_like(student, dtype=torch.bool).scatter(-1, ids, False)
    both = [
        torch.cat([side.gather(-1, ids), side.masked_fill(~rest, -torch.inf).logsumexp(-1, keepdim=True)], -1)
        for side in (student, teacher)
    ]
    expected: Any = divergence(*both)
    targets = StudentTopK(case.teacher, k)
    loss = fused_loss(
        case.hidden, case.head, case.labels, targets, divergence, chunk_size=chunk_size, diagnostics=True
    )
    assert_same(loss.total, expected.sum(), case.leaves, 1e-8)
    assert loss.total < divergence(student, teacher).sum()  # pyright: ignore[reportAttributeAccessIssue]
    plain = fused_loss(case.hidden, case.head, case.labels, case.teacher, divergence, diagnostics=True).sums
    torch.testing.assert_close(loss.sums["kl"], plain["kl"])


def test_the_students_top_k_of_all_tokens_is_the_divergence_itself() -> None:
    case = make_case(bias=True)
    losses = [
        fused_loss(case.hidden, case.head, case.labels, targets, reverse_kl, temperature=2.0, chunk_size=3).total
        for targets in (StudentTopK(case.teacher, VOCAB), case.teacher)
    ]
    assert torch.equal(*losses)
    assert all(torch.equal(*pair) for pair in zip(*(torch.autograd.grad(x, case.leaves) for x in losses), strict=True))


def test_k3_and_top_k_have_the_gradient_of_finite_differences() -> None:
    case = make_case(4, 6, 3)

    def loss(hidden: Tensor, objective: Any, targets: Any) -> Tensor:
        leaf = hidden.detach().requires_grad_()
        total = fused_loss(leaf, case.head, case.labels, targets, objective, chunk_size=3).total
        gradient = torch.autograd.grad(total, leaf)[0]
        return total.detach() + ((hidden - hidden.detach()) * gradient).sum()

    def k3(log_q: Tensor, known: Tensor) -> Tensor:
        return sampled_kl(log_q[:, 0], known[:, 0], "k3")

    for objective, targets in (
        (k3, SampledTargets(case.labels, targets=case.teacher)),
        (reverse_kl, StudentTopK(case.teacher, 3)),
    ):
        assert torch.autograd.gradcheck(lambda x, o=objective, t=targets: loss(x, o, t), (case.hidden,))


# Reference implementations


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_estimators_are_those_of_verl(estimator: str) -> None:
    logits = student_logits()
    estimate = sampled_kl(of_tokens(logits.log_softmax(-1)), of_tokens(TEACHER), estimator)
    recorded = torch.from_numpy(ARRAYS[f"verl_{estimator}"])
    # verl cuts k3 at 10, and its gradient there.
    far = estimate.detach() >= 10
    torch.testing.assert_close(estimate.detach()[~far], recorded[~far])
    gradient = torch.autograd.grad((estimate * (MASK & ~far)).sum(), logits)[0]
    recorded_gradient = torch.from_numpy(ARRAYS[f"verl_{estimator}__grad"]).masked_fill(far[..., None], 0)
    torch.testing.assert_close(gradient, recorded_gradient)


def test_the_policy_gradient_is_that_of_verl_and_trl() -> None:
    logits = student_logits()
    log_q, log_p = of_tokens(logits.log_softmax(-1)), of_tokens(TEACHER)
    plain = policy_gradient(log_q, log_p)[0]
    assert_golden("verl_policy_k1", plain, logits, scale=float(MASK.sum()))
    # k2 as a loss, the unbiased variants of k1 and k3, and TRL's loss on the sampled token.
    for name in ("verl_k2", "verl_k1+", "verl_k3+", "trl_sampled"):
        assert_gradient(name, plain * MASK, logits)
    gradient = torch.autograd.grad((plain * MASK).sum(), logits, retain_graph=True)[0]
    # verl also offers -k3 as the reward. That lacks the derivative of k3 itself, and so is biased.
    far = (sampled_kl(log_q, log_p, "k3") >= 10)[..., None]
    biased = torch.from_numpy(ARRAYS["verl_policy_k3__grad"]) * MASK.sum()
    missing = torch.from_numpy(ARRAYS["verl_k3__grad"])
    torch.testing.assert_close((biased + missing).masked_fill(far, 0), gradient.masked_fill(far, 0))


def test_the_policy_gradient_on_older_samples_is_that_of_verl() -> None:
    logits = student_logits()
    log_q = of_tokens(logits.log_softmax(-1))
    loss, clipped = policy_gradient(log_q, of_tokens(TEACHER), OLD, clip_ratio=0.2)
    # verl also bounds a ratio above 3 of a token with a negative advantage ("dual clip").
    assert (log_q.detach() - OLD).max() < math.log(3)
    assert 0 < int((clipped & MASK).sum()) < int(MASK.sum())
    assert_golden("verl_policy_k1_old", loss, logits, scale=float(MASK.sum()))


@pytest.mark.parametrize("old", [None, OLD], ids=["now", "older"])
def test_importance_weights_are_those_of_trls_iw_opd(old: Tensor | None) -> None:
    logits = student_logits()
    log_q, log_p = of_tokens(logits.log_softmax(-1)), of_tokens(TEACHER)
    gaps = (log_p - (log_q.detach() if old is None else old))[MASK]
    answers = torch.arange(len(MASK))[:, None].expand(MASK.shape)[MASK]
    weights = prefix_importance(gaps, answers, 0.5)
    # TRL's loss is -log q times the advantage, which is the sampling student's.
    loss = -log_q[MASK] * gaps * weights
    name = "trl_iw_opd" if old is None else "trl_iw_opd_old"
    torch.testing.assert_close(loss.sum().detach(), torch.from_numpy(ARRAYS[name]))
    assert_gradient(name, loss, logits)
    if old is None:
        assert_gradient(name, weights * policy_gradient(log_q, log_p)[0][MASK], logits)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_top_k_with_a_tail_and_whole_distributions_are_those_of_sdft_and_sdpo(beta: float) -> None:
    logits = student_logits()
    log_q = logits.log_softmax(-1)
    assert_golden(f"trl_full_{beta}", jsd(log_q, TEACHER, beta), logits)
    ids = log_q.detach().topk(5).indices
    ours, theirs = (side.gather(-1, ids).log_softmax(-1) for side in (log_q, TEACHER))
    assert_golden(f"trl_topk_renormalised_{beta}", jsd(ours, theirs, beta), logits)
    # The logits as states, which this head leaves as they are.
    head = LMHead(torch.eye(TEACHER.shape[-1], dtype=torch.float64))
    loss = torch.stack(
        [
            fused_loss(
                logits[row],
                head,
                SAMPLED[row],
                StudentTopK(DenseSignal(TEACHER[row], head), 5),
                lambda student, teacher: jsd(student, teacher, beta),
                weights=MASK[row].double(),
            ).total
            for row in range(len(MASK))
        ]
    )
    recorded = torch.from_numpy(ARRAYS[f"trl_topk_tail_{beta}"])
    torch.testing.assert_close(loss.detach(), (recorded * MASK).sum(-1))
    assert_gradient(f"trl_topk_tail_{beta}", loss, logits)


def test_the_forward_kl_on_the_teachers_top_k_is_that_of_verl() -> None:
    logits, ids = student_logits(), TEACHER.topk(5).indices
    signal = SparseSignal(ids.flatten(0, 1), TEACHER.gather(-1, ids).flatten(0, 1))
    head = LMHead(torch.eye(TEACHER.shape[-1], dtype=torch.float64))
    loss = fused_loss(logits.flatten(0, 1), head, SAMPLED.flatten(), signal, weights=MASK.flatten().double()).total
    # verl computes it in float32.
    recorded, gradient = (torch.from_numpy(ARRAYS[f"verl_forward_topk{part}"]).double() for part in ("", "__grad"))
    torch.testing.assert_close(loss.detach(), (recorded * MASK).sum(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_the_generalised_jsd_is_that_of_opsd(beta: float) -> None:
    logits = student_logits()
    student, teacher = (logits / 0.9).log_softmax(-1), (TEACHER / 0.9).log_softmax(-1)
    assert_golden(f"opsd_jsd_{beta}_None", (jsd(student, teacher, beta) * MASK).sum() / MASK.sum(), logits)
    # Its top-k is the teacher's, renormalised.
    ids = teacher.topk(5).indices
    ours, theirs = (side.gather(-1, ids).log_softmax(-1) for side in (student, teacher))
    assert_golden(f"opsd_jsd_{beta}_5", (jsd(ours, theirs, beta) * MASK).sum() / MASK.sum(), logits)


def test_the_skew_losses_are_those_of_distillm2() -> None:
    logits = student_logits()
    log_q = logits.log_softmax(-1)
    teacher_side = (skew_kl(log_q, TEACHER, 0.1) * MASK).sum(-1)
    torch.testing.assert_close(teacher_side.detach(), torch.from_numpy(ARRAYS["distillm2_teacher"]))
    assert_gradient("distillm2_teacher", teacher_side, logits)
    # On the student's answers its mixture is a constant, where ours carries a gradient, as the divergence does.
    student_side = (skew_reverse_kl(log_q, TEACHER, 0.1) * MASK).sum(-1)
    torch.testing.assert_close(student_side.detach(), torch.from_numpy(ARRAYS["distillm2_student"]))
    mixture = torch.logaddexp(TEACHER + math.log(0.9), log_q.detach() + math.log(0.1))
    assert_gradient("distillm2_student", (reverse_kl(log_q, mixture) * MASK).sum(-1), logits)
