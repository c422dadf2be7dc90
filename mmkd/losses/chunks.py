"""Approximate likelihood matching (ALM, 2503.20083): student and teacher compared by how likely they find a chunk.

A chunk is a piece of text that ends a token in both tokenisations, and its likelihood is the product of those of its
tokens. The two models are then compared on two outcomes, {this chunk, anything else}, with any divergence.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmkd.errors import UserError

from .divergences import Divergence, below_one, forward_kl, log_one_minus_exp

POLICIES = ("all", "space", "unbiased", "merge")
"""all, space: chunks as they come (`space`: made to end at white space), without debiasing. unbiased, merge: debiased
by the probability that the text could end there, where a chunk whose end the teacher finds improbable is left out
(unbiased) or continued by the next one (merge, the paper's)."""

# e**20 is far above any ratio that a student should learn from in one step, and its multiples are finite in fp32.
_LARGEST_EXPONENT = 20.0


def chunk_log_probs(
    token_log_probs: Float[Tensor, "token"], chunk: Int[Tensor, "token"], chunks: int
) -> Float[Tensor, "chunk"]:
    """The log-likelihood of each chunk: the sum over its tokens; tokens of chunk -1 belong to none."""
    # These go to one slot more, which is cut off: selecting them would make a GPU wait for their number.
    slot = torch.where(chunk < 0, chunks, chunk)
    return token_log_probs.new_zeros(chunks + 1).index_add(0, slot, token_log_probs)[:chunks]


# Which chunks are compared


@dataclass(frozen=True)
class ChunkGroups:
    """What is compared: each group of consecutive chunks is one item of the loss."""

    group: Int[Tensor, "chunk"]
    """The group of each chunk, -1 for a chunk that is left out."""
    last: Int[Tensor, "group"]
    """The last chunk of each group."""
    debiased: bool

    def __len__(self) -> int:
        return len(self.last)

    def log_probs(
        self, log_probs: Float[Tensor, "chunk"], boundary_log_probs: Float[Tensor, "chunk"] | None = None
    ) -> Float[Tensor, "group"]:
        """One model's log-likelihood of each group, times that of a boundary after it where these are debiased."""
        grouped = chunk_log_probs(log_probs, self.group, len(self))
        if not self.debiased:
            return grouped
        assert boundary_log_probs is not None, "debiasing needs the log-probs of a boundary after each chunk"
        return grouped + boundary_log_probs[self.last]


def group_chunks(
    policy: str,
    row: Int[Tensor, "chunk"],
    teacher_boundary_log_probs: Float[Tensor, "chunk"] | None = None,
    threshold: float = 0.1,
) -> ChunkGroups:
    """The items of the loss under one of POLICIES.

    Chunks are in the order of the text; `row` numbers the text that each is from. The boundary log-probs are those of
    the teacher, who decides for both: the probability, after the chunk, of a token that begins a new word or ends the
    text. A chunk has a probable end when that is above the threshold (the paper's gamma); the last one of a row ends
    anyway. Raises UserError for an unknown policy, and without boundaries where the policy needs them.
    """
    if policy not in POLICIES:
        raise UserError(f"Chunk policy {policy!r} is unknown; choose one of {', '.join(POLICIES)}.")
    index = torch.arange(len(row), device=row.device)
    if policy in ("all", "space"):
        return ChunkGroups(index, index, debiased=False)
    if teacher_boundary_log_probs is None:
        raise UserError(
            f"Chunk policy {policy} needs the teacher's probability of a boundary after each chunk, and this teacher "
            "does not provide it; use policy all or space."
        )
    probable = teacher_boundary_log_probs.detach().exp() > threshold
    if policy == "unbiased":
        return ChunkGroups(torch.where(probable, probable.cumsum(0) - 1, -1), index[probable], debiased=True)
    ends = probable | _row_ends(row)
    return ChunkGroups(ends.cumsum(0) - ends.long(), index[ends], debiased=True)


def _row_ends(row: Int[Tensor, "chunk"]) -> Bool[Tensor, "chunk"]:
    ends = torch.ones_like(row, dtype=torch.bool)
    ends[:-1] = row[1:] != row[:-1]
    return ends


# How they are compared


def binarised(
    student_log_probs: Float[Tensor, "chunk"],
    teacher_log_probs: Float[Tensor, "chunk"],
    divergence: Divergence = forward_kl,
    temperature: float = 100.0,
) -> Float[Tensor, "chunk"]:
    """A divergence over the outcomes {this chunk, anything else}, p and 1 - p, where p = likelihood^(1 / temperature).

    In the unit of the divergence, and not multiplied by the temperature or its square: gradients shrink with 1 /
    temperature. At most the divergence between all texts: two outcomes cannot tell apart more than all of them can.
    """
    return divergence(_outcomes(student_log_probs, temperature), _outcomes(teacher_log_probs, temperature))


def binary_kl_limit(
    student_log_probs: Float[Tensor, "*item"], teacher_log_probs: Float[Tensor, "*item"]
) -> Float[Tensor, "*item"]:
    """temperature * KL of the binarised chunks in nats, as the temperature goes to infinity (ALM, section 3).

    With a, b the negative log-likelihoods of teacher and student: a log(a / b) - a + b, the KL of two Poisson
    distributions with these rates.
    """
    # Strictly below certainty: at a likelihood of 1 the logarithm of the rate, and its gradient, are infinite.
    a, b = -below_one(teacher_log_probs), -below_one(student_log_probs)
    return a * (a / b).log() - a + b


def absolute_difference(
    student_log_probs: Float[Tensor, "*item"], teacher_log_probs: Float[Tensor, "*item"]
) -> Float[Tensor, "*item"]:
    """The distance between the log-likelihoods, in nats."""
    return (teacher_log_probs - student_log_probs).abs()


def joschu_k2(
    student_log_probs: Float[Tensor, "*item"], teacher_log_probs: Float[Tensor, "*item"], temperature: float = 1.0
) -> Float[Tensor, "*item"]:
    """Half the squared log-ratio, an estimate of a KL by few samples (joschu.net/blog/kl-approx.html)."""
    return ((teacher_log_probs - student_log_probs) / temperature).square() / 2


def joschu_k3(
    student_log_probs: Float[Tensor, "*item"], teacher_log_probs: Float[Tensor, "*item"], temperature: float = 1.0
) -> Float[Tensor, "*item"]:
    """r - 1 - log r with r = teacher / student, an estimate of KL(student || teacher) by samples of the student.

    Continued linearly in log r where r is above e^20, so that it stays finite.
    """
    log_ratio = (teacher_log_probs - student_log_probs) / temperature
    beyond = (log_ratio - _LARGEST_EXPONENT).clamp(min=0)
    # expm1: near a ratio of 1, where a trained student is, r - 1 and log r cancel to the last digits.
    ratio_less_one = log_ratio.clamp(max=_LARGEST_EXPONENT).expm1()
    return ratio_less_one + math.exp(_LARGEST_EXPONENT) * beyond - log_ratio


def _outcomes(log_probs: Tensor, temperature: float) -> Float[Tensor, "chunk 2"]:
    log_probs = log_probs / temperature
    return torch.stack([log_probs, log_one_minus_exp(log_probs)], dim=-1)
