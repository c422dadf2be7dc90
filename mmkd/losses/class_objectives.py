"""What the distillation head of a classifier may learn from a teacher's logits: KL, OFA or PLD, per row."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

from .dual_head_losses import distillation_loss
from .list_ranking import pld

KD_LOSSES = ("kl", "ofa", "pld")

RowLoss = Callable[[Tensor, Tensor, Tensor], Float[Tensor, "row"]]
"""(student's logits, teacher's logits, labels, negative where there is none) -> the loss of each row."""


def ofa_loss(
    student_logits: Float[Tensor, "row class"],
    teacher_logits: Float[Tensor, "row class"],
    labels: Int[Tensor, "row"],
    temperature: float = 1.0,
    epsilon: float = 1.0,
) -> Float[Tensor, "row"]:
    """OFA-KD's loss (NeurIPS 2023, 2310.19444): -sum_c ((p_c + [c = y])^epsilon - [c = y]) log q_c, in nats.

    p and q are the teacher's and the student's probabilities at the temperature. epsilon 1 is the cross-entropy of p
    and q; above 1, the label's class weighs more and the others less. A row whose label is negative has no class y.
    """
    student = (student_logits.float() / temperature).log_softmax(-1)
    teacher = (teacher_logits.float() / temperature).softmax(-1)
    known = labels >= 0
    target = one_hot(labels.where(known, 0), teacher.shape[-1]).to(teacher.dtype) * known[:, None]
    return -(((teacher + target) ** epsilon - target) * student).sum(-1)


def ranking_loss(
    student_logits: Float[Tensor, "row class"],
    teacher_logits: Float[Tensor, "row class"],
    labels: Int[Tensor, "row"],
    temperature: float = 1.0,
) -> Float[Tensor, "row"]:
    """PLD (NeurIPS 2025, 2506.12542) in nats; a row without a label (negative) takes the teacher's first class."""
    labels = labels.where(labels >= 0, teacher_logits.argmax(-1))
    return pld(student_logits, teacher_logits, labels, temperature)


def class_objective(kind: str, temperature: float, epsilon: float) -> RowLoss:
    """The loss that `kd_loss` names."""
    if kind == "ofa":
        return lambda student, teacher, labels: ofa_loss(student, teacher, labels, temperature, epsilon)
    if kind == "pld":
        return lambda student, teacher, labels: ranking_loss(student, teacher, labels, temperature)
    return lambda student, teacher, labels: distillation_loss(student, teacher, temperature)


def aspect_loss(logits: Float[Tensor, "row question"], answers: Float[Tensor, "row question"]) -> Float[Tensor, "row"]:
    """MaKD's loss (2501.13341): binary cross-entropy with the probability of a yes, in nats, mean over questions.

    An answer that is NaN is none, and counts as a loss of 0.
    """
    known = ~answers.isnan()
    with torch.autocast(logits.device.type, enabled=False):
        answers = answers.float().where(known, 0.5)
        losses = binary_cross_entropy_with_logits(logits.float(), answers, reduction="none")
    return (losses * known).mean(-1)
