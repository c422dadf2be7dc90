"""Divergences between two distributions: nats per item from log-probabilities over any kind of outcomes.

Every function takes student and teacher log-probabilities whose last axis holds the outcomes and returns one value per
item. None of them shifts, masks, tempers or reduces. Outcomes of probability zero (`-inf`) on both sides add nothing.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmkd.errors import UserError

Divergence = Callable[[Tensor, Tensor], Tensor]
"""(student log-probs, teacher log-probs) -> nats per item."""

# exp(_LOG_ZERO) is 0 in every dtype and _LOG_ZERO itself is finite in fp16, so that p log p is 0, and not NaN, where p
# is 0.
_LOG_ZERO = -1e4


def forward_kl(
    student_log_probs: Float[Tensor, "*item outcome"], teacher_log_probs: Float[Tensor, "*item outcome"]
) -> Float[Tensor, "*item"]:
    """KL(teacher || student) in nats: mode-covering, as used by Hinton et al. (2015)."""
    log_p, log_q = finite_log_probs(teacher_log_probs), finite_log_probs(student_log_probs)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(
    student_log_probs: Float[Tensor, "*item outcome"], teacher_log_probs: Float[Tensor, "*item outcome"]
) -> Float[Tensor, "*item"]:
    """KL(student || teacher) in nats: mode-seeking (MiniLLM, 2306.08543)."""
    return forward_kl(teacher_log_probs, student_log_probs)


def jsd(
    student_log_probs: Float[Tensor, "*item outcome"],
    teacher_log_probs: Float[Tensor, "*item outcome"],
    beta: float = 0.5,
) -> Float[Tensor, "*item"]:
    """Generalised Jensen-Shannon divergence in nats (GKD, 2306.13649, eq. 1).

    beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta teacher + (1 - beta) student. As in TRL, beta = 0
    is the forward KL and beta = 1 the reverse KL. Raises UserError when beta is outside [0, 1].
    """
    _check_weight("beta", beta)
    if beta == 0:
        return forward_kl(student_log_probs, teacher_log_probs)
    if beta == 1:
        return reverse_kl(student_log_probs, teacher_log_probs)
    return _apply(_JensenShannon, student_log_probs, teacher_log_probs, beta)


def skew_kl(
    student_log_probs: Float[Tensor, "*item outcome"],
    teacher_log_probs: Float[Tensor, "*item outcome"],
    skew: float = 0.1,
) -> Float[Tensor, "*item"]:
    """KL(teacher || skew teacher + (1 - skew) student) in nats (DistiLLM, 2402.03898, eq. 4).

    Raises UserError when skew is outside [0, 1].
    """
    _check_weight("skew", skew)
    if skew == 0:
        return forward_kl(student_log_probs, teacher_log_probs)
    return _apply(_SkewKL, student_log_probs, teacher_log_probs, skew)


def skew_reverse_kl(
    student_log_probs: Float[Tensor, "*item outcome"],
    teacher_log_probs: Float[Tensor, "*item outcome"],
    skew: float = 0.1,
) -> Float[Tensor, "*item"]:
    """KL(student || skew student + (1 - skew) teacher) in nats (DistiLLM, 2402.03898, eq. 5).

    Raises UserError when skew is outside [0, 1].
    """
    return skew_kl(teacher_log_probs, student_log_probs, skew)


def tvd(
    student_log_probs: Float[Tensor, "*item outcome"], teacher_log_probs: Float[Tensor, "*item outcome"]
) -> Float[Tensor, "*item"]:
    """Total variation distance, half the L1 distance of the probabilities, in [0, 1]."""
    return (teacher_log_probs.exp() - student_log_probs.exp()).abs().sum(-1) / 2


def adaptive_kl(
    student_log_probs: Float[Tensor, "*item outcome"],
    teacher_log_probs: Float[Tensor, "*item outcome"],
    mu: float = 0.5,
    *,
    taid_parity: bool = False,
) -> Float[Tensor, "*item"]:
    """Forward and reverse KL, weighted by where the two distributions differ, in nats (AKL, 2404.02657).

    The head is the smallest set of the teacher's most likely outcomes with a mass of at least `mu`; the tail is all
    other outcomes. The weight of the forward KL is the head's share of the L1 gap, that of the reverse KL the tail's.
    The shares carry no gradient. With `mu` = 1 this is the forward KL, with 0 the reverse KL.

    `taid_parity` reproduces defects of the TAID repository, for golden tests only: the head's mask is applied to the
    gaps in vocabulary order, the shares carry a gradient, and the forward part lacks the teacher's entropy. Raises
    UserError when mu is outside [0, 1].
    """
    _check_weight("mu", mu)
    if mu == 1 and not taid_parity:
        # Rounded sums of probabilities reach 1 before the last outcome, which would leave a tail.
        return forward_kl(student_log_probs, teacher_log_probs)
    log_p, log_q = finite_log_probs(teacher_log_probs), finite_log_probs(student_log_probs)
    p, q = log_p.exp(), log_q.exp()
    gap = (p - q).abs()
    forward, reverse = forward_kl(log_q, log_p), reverse_kl(log_q, log_p)
    if taid_parity:
        top = p.detach().sort(-1, descending=True).values
        head_gap = (gap * (top.cumsum(-1) - top < mu).flip(-1)).sum(-1)
        forward = forward - (p * log_p).sum(-1)
    else:
        gap = gap.detach()
        head_gap = _head_gap(p.detach(), gap, mu)
    total_gap = gap.sum(-1)
    head_share = head_gap / total_gap.clamp(min=torch.finfo(gap.dtype).tiny)
    return head_share * forward + (1 - head_share) * reverse


def interpolated_log_probs(
    student_log_probs: Float[Tensor, "*item outcome"], teacher_log_probs: Float[Tensor, "*item outcome"], t: float
) -> Float[Tensor, "*item outcome"]:
    """log softmax((1 - t) student + t teacher): the intermediate teacher of TAID (2501.16937, eq. 3), no gradient.

    The paper interpolates logits. Log-probs give the same: they differ by a constant per item, which softmax ignores.
    """
    if t == 0:
        return student_log_probs.detach()
    if t == 1:
        return teacher_log_probs
    return torch.lerp(
        finite_log_probs(student_log_probs.detach()), finite_log_probs(teacher_log_probs), t
    ).log_softmax(-1)


def renyi(
    student_log_probs: Float[Tensor, "*item outcome"],
    teacher_log_probs: Float[Tensor, "*item outcome"],
    alpha: float = 2.0,
) -> Float[Tensor, "*item"]:
    """The Renyi divergence of the teacher from the student in nats, log(sum p^alpha q^(1 - alpha)) / (alpha - 1).

    Alpha 1 is the forward KL. No outcome may have probability 0. Raises UserError when alpha is not positive.
    """
    if alpha <= 0:
        raise UserError(f"alpha is {alpha}; the Renyi divergence needs a positive order.")
    if alpha == 1:
        return forward_kl(student_log_probs, teacher_log_probs)
    # A sum of logs, since q^(1 - alpha) overflows where the student finds an outcome all but impossible.
    return torch.logsumexp(alpha * teacher_log_probs + (1 - alpha) * student_log_probs, -1) / (alpha - 1)


def log_one_minus_exp(log_probs: Float[Tensor, "*item"]) -> Float[Tensor, "*item"]:
    """log(1 - p) from log p <= 0, finite down to a remainder of one unit in the last place of p."""
    log_probs = below_one(log_probs)
    # log(1 - e^x) is exact as log(-expm1(x)) above -log 2 and as log1p(-e^x) below it (Maechler 2012).
    near_one = log_probs > -0.6931
    # Each branch sees its own values, and -1 in place of the others: an infinite derivative of the branch that is not
    # taken would be multiplied by 0 and give NaN.
    of_large = (-log_probs.where(near_one, -1).expm1()).log()
    of_small = (-log_probs.where(~near_one, -1).exp()).log1p()
    return of_large.where(near_one, of_small)


def below_one(log_probs: Float[Tensor, "*item"]) -> Float[Tensor, "*item"]:
    """The log-probs, at most -eps: a probability of 1 becomes the next smaller number."""
    return log_probs.clamp(max=-torch.finfo(log_probs.dtype).eps)


def entropy(log_probs: Float[Tensor, "*item outcome"]) -> Float[Tensor, "*item"]:
    """-sum p log p in nats."""
    return -(log_probs.exp() * finite_log_probs(log_probs)).sum(-1)


class _JensenShannon(torch.autograd.Function):
    """The JSD with closed-form derivatives, in half the time of autograd.

    The derivative of beta KL(p || m) + (1 - beta) KL(q || m) by log p is beta p (log p - log m), and that by log q is
    (1 - beta) q (log q - log m): the terms by way of m cancel, and the products are those that the value sums up.
    """

    @staticmethod
    def forward(ctx: Any, log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
        p, q = log_p.exp(), log_q.exp()
        log_mixture = _positive(torch.lerp(q, p, beta)).log()
        # In place: over a vocabulary of 152k each of these tensors is as large as the logits.
        student, teacher = q.mul_(log_q - log_mixture), p.mul_(log_p - log_mixture)
        ctx.beta = beta
        ctx.save_for_backward(student, teacher if ctx.needs_input_grad[1] else None)
        return beta * teacher.sum(-1) + (1 - beta) * student.sum(-1)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        student: Tensor
        teacher: Tensor | None
        student, teacher = ctx.saved_tensors
        grad_p = None if teacher is None else ctx.beta * grad[..., None] * teacher
        return (1 - ctx.beta) * grad[..., None] * student, grad_p, None


class _SkewKL(torch.autograd.Function):
    """KL(p || m), m = skew p + (1 - skew) q, with its derivatives by log q and log p."""

    @staticmethod
    def forward(ctx: Any, log_q: Tensor, log_p: Tensor, skew: float) -> Tensor:
        p, q = log_p.exp(), log_q.exp()
        mixture = _positive(torch.lerp(q, p, skew))
        terms, ratio = p * (log_p - mixture.log()), p / mixture
        ctx.save_for_backward(
            (q * ratio).mul_(skew - 1) if ctx.needs_input_grad[0] else None,
            terms + p - skew * ratio * p if ctx.needs_input_grad[1] else None,
        )
        return terms.sum(-1)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        return *(None if by is None else grad[..., None] * by for by in ctx.saved_tensors), None


def _apply(function: type[torch.autograd.Function], student: Tensor, teacher: Tensor, weight: float) -> Tensor:
    return cast(Any, function).apply(finite_log_probs(student), finite_log_probs(teacher), weight)


def _head_gap(p: Tensor, gap: Tensor, mu: float) -> Tensor:
    """The gap over the smallest set of most likely outcomes with mass mu, per item."""
    items, outcomes = p.shape[:-1], p.shape[-1]
    p, gap = p.reshape(-1, outcomes), gap.reshape(-1, outcomes)
    head_gap = p.new_zeros(len(p))
    remaining = torch.arange(len(p), device=p.device)
    # In half precision a cumulative sum stops growing long before it reaches mu.
    precise = torch.promote_types(p.dtype, torch.float32)
    # A sort of the whole vocabulary costs several times the divergence, and only flat distributions need it.
    for size in [*(size for size in (64, 4096) if size < outcomes), outcomes]:
        top, order = p.topk(size)
        head_gap[remaining] = (gap.gather(-1, order) * (top.cumsum(-1, dtype=precise) - top < mu)).sum(-1)
        short = (top.sum(-1, dtype=precise) < mu).nonzero()[:, 0]
        if not len(short):
            break
        remaining, p, gap = remaining[short], p[short], gap[short]
    return head_gap.reshape(items)


def finite_log_probs(log_probs: Float[Tensor, "*item outcome"]) -> Float[Tensor, "*item outcome"]:
    """The log-probs with a large negative number for -inf, whose probability is 0 as well."""
    # A clamp is almost never needed, and its backward pass costs more than the divergence: look for -inf first. On a
    # GPU the answer would have to wait for all queued work, which costs more than the clamp.
    needed = log_probs.device.type != "cpu" or (log_probs.numel() > 0 and not log_probs.detach().amin() > -torch.inf)
    return log_probs.clamp(min=_LOG_ZERO) if needed else log_probs


def _positive(probs: Tensor) -> Tensor:
    return probs + torch.finfo(probs.dtype).tiny


def _check_weight(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{name} is {value}; it weighs two distributions and must lie between 0 and 1.")
