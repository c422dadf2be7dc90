"""Divergences between the pairwise differences of a few logits: BiLD, and DBiLD of Switch-KD.

They take log-probabilities as the divergences in `mmkd.losses.divergences` do, since the differences of log-probs are
those of the logits. Each compares two sets of outcomes: the teacher's most likely ones (teacher-led), and those of the
student (student-led). Within a set, the differences z_i - z_j of all pairs (i likelier than j) go through a softmax,
and a KL compares the two results, in nats. Outcomes in neither set have no influence, so that a value of 0 does not
mean that the distributions are equal.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .divergences import finite_log_probs, forward_kl, reverse_kl

# Where a pair does not count: finite, so that 0 times it is 0, and far below every difference of real log-probs.
_LEFT_OUT = -1e9


def bild(
    student_log_probs: Float[Tensor, "*item outcome"],
    teacher_log_probs: Float[Tensor, "*item outcome"],
    top_k: int = 8,
) -> Float[Tensor, "*item"]:
    """KL(teacher || student) of the differences within the top k of the teacher, and again within the student's.

    BiLD (2406.13555), as in the authors' code: their k is 8, their temperature 3.
    """
    student, teacher = finite_log_probs(student_log_probs), finite_log_probs(teacher_log_probs)
    total = student.new_zeros(student.shape[:-1])
    for leader in (teacher, student):
        ids = leader.detach().topk(min(top_k, leader.shape[-1])).indices
        total = total + forward_kl(_pair_log_probs(student, ids), _pair_log_probs(teacher, ids))
    return total


def dbild(
    student_log_probs: Float[Tensor, "*item outcome"],
    teacher_log_probs: Float[Tensor, "*item outcome"],
    max_k: int = 32,
) -> Float[Tensor, "*item"]:
    """KL(student || teacher) of the differences within the head of the teacher, and again within the student's.

    DBiLD of Switch-KD (2604.14629), of which no code was published. The head of each side ends at the knee of its own
    sorted probabilities (`head_sizes`), so that k differs from token to token. Built as the paper describes it:
    Kneedle's knee, both directions, the reverse KL, the sum of the two without weights (its temperature is 3). Ours is
    where the knee is sought: among the `max_k` likeliest outcomes, since pairs of all outcomes before the knee of a
    whole vocabulary would be too many.
    """
    student, teacher = finite_log_probs(student_log_probs), finite_log_probs(teacher_log_probs)
    total = student.new_zeros(student.shape[:-1])
    for leader in (teacher, student):
        top, ids = leader.detach().topk(min(max_k, leader.shape[-1]))
        sizes = head_sizes(top.exp())
        if ids.device.type == "cpu" and ids.numel():
            # Heads are short, and pairs grow with the square. A GPU would have to wait for the number.
            ids = ids[..., : int(sizes.max())]
        counted = _within(sizes, ids.shape[-1])
        total = total + reverse_kl(_pair_log_probs(student, ids, counted), _pair_log_probs(teacher, ids, counted))
    return total


def head_sizes(probs: Float[Tensor, "*item outcome"]) -> Int[Tensor, "*item"]:
    """The number of outcomes up to the knee of descending probabilities, at least 2 where there are as many.

    Kneedle: the curve is scaled to the unit square, and the knee is the point farthest below the line from its first
    to its last point. A curve that is nowhere below that line has no tail, and all of it is the head.
    """
    outcomes = probs.shape[-1]
    if outcomes <= 2:
        return torch.full(probs.shape[:-1], outcomes, device=probs.device)
    first, last = probs[..., :1], probs[..., -1:]
    tiny = torch.finfo(probs.dtype).tiny
    line = torch.linspace(1, 0, outcomes, dtype=probs.dtype, device=probs.device)
    distance, knee = (line - (probs - last) / (first - last).clamp(min=tiny)).max(-1)
    # In a flat curve all points are on the line, and 0 / 0 would be the largest distance.
    bent = (distance > outcomes * torch.finfo(probs.dtype).eps) & (first != last)[..., 0]
    return torch.where(bent, (knee + 1).clamp(min=2), outcomes)


def _pair_log_probs(
    log_probs: Float[Tensor, "*item outcome"],
    ids: Int[Tensor, "*item chosen"],
    counted: Bool[Tensor, "*item pair"] | None = None,
) -> Float[Tensor, "*item pair"]:
    """log softmax over the pairs (i before j) of the chosen outcomes of z_i - z_j."""
    chosen = log_probs.gather(-1, ids)
    first, second = torch.triu_indices(ids.shape[-1], ids.shape[-1], offset=1, device=ids.device)
    differences = chosen[..., first] - chosen[..., second]
    if counted is not None:
        differences = differences.masked_fill(~counted, _LEFT_OUT)
    # Without a pair, of a single outcome, there is no distribution and no loss.
    return differences.log_softmax(-1) if differences.shape[-1] else differences


def _within(sizes: Int[Tensor, "*item"], outcomes: int) -> Bool[Tensor, "*item pair"]:
    """Which pairs (i before j) of so many outcomes have both in the head."""
    second = torch.triu_indices(outcomes, outcomes, offset=1, device=sizes.device)[1]
    return second < sizes[..., None]
