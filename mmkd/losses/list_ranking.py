"""Losses of ordered lists (Plackett-Luce), of classes or of hard negatives: pure functions, reduced by the caller.

A list is drawn without replacement: item after item is picked among those that are left, with softmax probability of
its score. Each pick costs its negative log-probability in nats, times a weight. Everything is computed in fp32 or
better under any autocast; a cumulative log-sum-exp over a thousand classes in bf16 would be noise.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_FAR_BELOW = 1000.0
"""Nats that an absent item lies below the others: its probability is exactly 0, without infinities."""


def plackett_luce(scores: Float[Tensor, "row item"], weights: Float[Tensor, "row item"]) -> Float[Tensor, "row"]:
    """sum_k w_k (log sum_{l >= k} exp(s_l) - s_k) of lists in their order, best item first, in nats.

    A score of -inf means that the item is absent: it costs nothing and is never picked. Weights 1, 0, 0, ... give the
    cross-entropy of the first item, equal weights ListMLE, decreasing ones position-aware ListMLE.
    """
    dtype = torch.promote_types(scores.dtype, torch.float32)
    with torch.autocast(scores.device.type, enabled=False):
        scores, absent = scores.to(dtype), scores == -torch.inf
        present = scores.detach()
        highest = present.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        lowest = present.masked_fill(absent, torch.inf).amin(-1, keepdim=True).nan_to_num(posinf=0.0)
        # Relative to the highest, since what all scores share would cost digits in the sums.
        scores = scores.where(~absent, lowest - _FAR_BELOW) - highest
        remaining = scores.flip(-1).logcumsumexp(-1).flip(-1)
        return (weights.to(dtype).masked_fill(absent, 0) * (remaining - scores)).sum(-1)


def pld(
    student_logits: Float[Tensor, "row class"],
    teacher_logits: Float[Tensor, "row class"],
    labels: Int[Tensor, "row"],
    temperature: float = 1.0,
) -> Float[Tensor, "row"]:
    """Plackett-Luce distillation (2506.12542): the label first, then the other classes by descending teacher logit.

    The weight of each pick is the teacher's probability of its class at `temperature`; the student's logits are not
    softened. Of classes with equal teacher logits the one with the lower number comes first.
    """
    dtype = torch.promote_types(teacher_logits.dtype, torch.float32)
    teacher = teacher_logits.detach().to(dtype)
    is_label = torch.zeros_like(teacher, dtype=torch.bool).scatter_(-1, labels[:, None], True)
    order = teacher.masked_fill(is_label, torch.inf).sort(dim=-1, descending=True, stable=True).indices
    weights = (teacher / temperature).softmax(-1)
    return plackett_luce(student_logits.gather(-1, order), weights.gather(-1, order))


def cprd(
    scores: Float[Tensor, "row item"], teacher_scores: Float[Tensor, "row item"], valid: Bool[Tensor, "row item"]
) -> Float[Tensor, "row"]:
    """Contrastive partial ranking distillation (2407.07479) over hard negatives, in nats, summed over picks.

    Negatives are ordered by descending teacher score, and the order counts up to the first that is not valid; each of
    these is the positive among all that follow it. `scores` are the student's, divided by its temperature. A teacher
    score of -inf says that the item is no candidate at all. A row without a valid item costs 0.
    """
    teacher = teacher_scores.detach().float()
    teacher, order = teacher.sort(dim=-1, descending=True, stable=True)
    candidates = scores.gather(-1, order).masked_fill(teacher == -torch.inf, -torch.inf)
    weights = (valid & (teacher_scores > -torch.inf)).gather(-1, order).cumprod(-1)
    return plackett_luce(candidates, weights)
