"""The reverse KL estimated from the tokens that the student sampled: one log-prob of the teacher per token.

With q the student, p the teacher and x drawn from q, KL(q || p) is the mean of log q(x) - log p(x). A sampled token is
one outcome: the functions take and return one value per token. See J. Schulman, "Approximating KL divergence" (2020).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

ESTIMATORS = ("k1", "k3")

# exp of more overflows fp32 once it is squared. A sample of q finds p/q above e^20 with probability e^-20.
_LOG_RATIO_LIMIT = 20.0


def sampled_kl(
    student_log_probs: Float[Tensor, "*token"], teacher_log_probs: Float[Tensor, "*token"], estimator: str = "k1"
) -> Float[Tensor, "*token"]:
    """An estimate of KL(student || teacher) in nats from one sample of the student per token.

    `k1` is log(q/p), which may be negative; `k3` is p/q - 1 - log(p/q), which is not, and varies less. The mean of
    both is the KL. The mean of their derivatives by the student is not the KL's: that of k1 is 0, whatever the
    teacher, and that of k3 is the gradient of the *forward* KL(p || q).
    """
    log_ratio = teacher_log_probs - student_log_probs
    if estimator == "k1":
        return -log_ratio
    return log_ratio.clamp(max=_LOG_RATIO_LIMIT).expm1() - log_ratio


def policy_gradient(
    student_log_probs: Float[Tensor, "*token"],
    teacher_log_probs: Float[Tensor, "*token"],
    sampling_log_probs: Float[Tensor, "*token"] | None = None,
    *,
    baseline: float = 0.0,
    clip_ratio: float | None = None,
) -> tuple[Float[Tensor, "*token"], Float[Tensor, "*token"]]:
    """A loss whose gradient is an unbiased estimate of that of KL(student || teacher), and which ratios were clipped.

    The advantage of a token is A = log p - log q + baseline, without gradient. With r the student's probability over
    that of the student that sampled the token, 1 where both are the same, the loss is -r A. `clip_ratio` c takes the
    larger of -r A and -min(max(r, 1 - c), 1 + c) A (PPO, 1707.06347, eq. 7), which costs the lack of bias once the two
    students differ.

    Differentiating k1 and k3 properly, with the dependence of the *sample* on the student, gives this gradient for
    both, token by token: k3 grad(log q) + grad(k3) = log(q/p) grad(log q).
    """
    old = student_log_probs.detach() if sampling_log_probs is None else sampling_log_probs
    ratio = (student_log_probs - old).clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT).exp()
    advantage = (teacher_log_probs - student_log_probs).detach() + baseline
    loss = -ratio * advantage
    if clip_ratio is None:
        return loss, torch.zeros_like(ratio, dtype=torch.bool)
    clipped = -ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * advantage
    return torch.maximum(loss, clipped), clipped.detach() > loss.detach()


def prefix_importance(
    log_ratios: Float[Tensor, "token"], answers: Int[Tensor, "token"], gamma: float = 0.5
) -> Float[Tensor, "token"]:
    """The weights of IW-OPD (2606.22600, algorithm 1) of tokens that follow each other, in [1, 1 + gamma].

    A token's weight is 1 + gamma (1 - d / D), with d the sum of |log p - log q| over the tokens of its answer before
    it, and D that over its whole answer: the first token has 1 + gamma, and the weight falls as the answer strays from
    what the teacher would say. `answers` numbers the answer of each token, in ascending order from 0.
    """
    # Differences of sums over a whole batch lose digits; mps has no float64.
    wide = torch.float32 if log_ratios.device.type == "mps" else torch.float64
    gaps = log_ratios.detach().abs().to(wide)
    before = gaps.cumsum(0) - gaps
    count = int(answers.max()) + 1 if len(answers) else 0
    totals = gaps.new_zeros(count).index_add(0, answers, gaps)
    begins = totals.cumsum(0) - totals
    share = (before - begins[answers]) / totals[answers].clamp(min=1e-8)
    return (1 + gamma * (1 - share)).to(log_ratios)
