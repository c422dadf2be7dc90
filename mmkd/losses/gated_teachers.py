"""MST-Distill (2507.07015): several teachers of classes, chosen for each row by a gate that reads the student."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .dual_head_losses import distillation_loss

BALANCES = ("kl", "cv", "none")


def teacher_losses(
    student_logits: Float[Tensor, "row class"],
    teacher_logits: Float[Tensor, "row teacher class"],
    temperature: float = 4.0,
) -> Float[Tensor, "row teacher"]:
    """temperature^2 KL(teacher || student) in nats, of each row and teacher."""
    losses = [distillation_loss(student_logits, logits, temperature) for logits in teacher_logits.unbind(1)]
    return torch.stack(losses, 1)


def chosen_teachers(gate_logits: Float[Tensor, "row teacher"], top_k: int) -> Int[Tensor, "row chosen"]:
    """The numbers of the teachers that the gate scores highest."""
    return gate_logits.topk(top_k, -1).indices


def gated_loss(
    losses: Float[Tensor, "row teacher"],
    gate_logits: Float[Tensor, "row teacher"],
    top_k: int,
    *,
    published: bool = False,
) -> Float[Tensor, "row"]:
    """The losses of the `top_k` teachers of each row, weighted by the gate's probabilities among them.

    The gate gets the gradient of the loss that its probabilities expect of all teachers, so it learns which of them
    the student can follow, also where one is chosen and its probability is always 1. `published`, for golden tests
    only: the chosen teachers weigh the same, as in the authors' code, where this loss teaches the gate nothing.
    """
    chosen = chosen_teachers(gate_logits, top_k)
    kept = losses.gather(-1, chosen)
    if published:
        return kept.mean(-1)
    weights = gate_logits.detach().gather(-1, chosen).softmax(-1)
    expected = (gate_logits.softmax(-1) * losses.detach()).sum(-1)
    return (kept * weights).sum(-1) + expected - expected.detach()


def blended_logits(
    teacher_logits: Float[Tensor, "row teacher class"], gate_logits: Float[Tensor, "row teacher"]
) -> Float[Tensor, "row class"]:
    """The mean of the teachers' logits by the gate's probabilities: one teacher, through which the gate learns."""
    return (gate_logits.softmax(-1)[..., None] * teacher_logits).sum(1)


def balance_loss(mean_gate: Float[Tensor, "teacher"], kind: str = "kl") -> Float[Tensor, ""]:
    """How far the gate's mean probabilities are from using all teachers alike; 0 when they are equal.

    kl: KL(uniform || mean) in nats over the number of teachers. cv: their standard deviation over their mean.
    """
    teachers = len(mean_gate)
    if kind == "cv":
        return mean_gate.std() / mean_gate.mean()
    uniform = torch.full_like(mean_gate, 1 / teachers)
    return (uniform * (uniform.log() - mean_gate.clamp(min=1e-12).log())).sum() / teachers
