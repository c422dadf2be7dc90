"""Approximate likelihood matching (ALM, 2503.20083): student and teacher are compared by the likelihood of chunks.

A chunk is a piece of text that ends with a token in both tokenisations. Its likelihood is the product of the
likelihoods of its tokens. A divergence then compares the two models on two outcomes, {this chunk, anything else}.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmkd.errors import UserError

from .divergences import Divergence, below_one, forward_kl, log_one_minus_exp

POLICIES = ("all", "space", "unbiased", "merge")
"""all: every chunk. space: chunks are merged until they end at white space. unbiased, merge: chunks are debiased by
the probability that a text could end there; a chunk whose end is improbable for the teacher is left out (unbiased) or
merged with the next chunk (merge, as in the paper)."""

# e**20 is far above any ratio that a student should learn from in one step, and multiples of it are finite in fp32.
_LARGEST_EXPONENT = 20.0


def chunk_log_probs(
    token_log_probs: Float[Tensor, "token"], chunk: Int[Tensor, "token"], chunks: int
) -> Float[Tensor, "chunk"]:
    """The log-likelihood of each chunk in nats: the sum over its tokens. Tokens of chunk -1 are left out."""
    # Tokens in no chunk go to a slot of their own that is cut off: a mask would need a copy of a data-dependent size,
    # for which a GPU has to wait.
    slot = torch.where(chunk < 0, chunks, chunk)
    return token_log_probs.new_zeros(chunks + 1).index_add(0, slot, token_log_probs)[:chunks]


# Which chunks are compared


@dataclass(frozen=True)
class ChunkGroups:
    """Groups of consecutive chunks; each group is one item of the loss."""

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
        """One model's log-likelihood of each group in nats; if debiased, of the group and a boundary after it."""
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

    Chunks are in the order of the text; `row` is the number of the text that each belongs to. The teacher decides for
    both models: its boundary log-prob is that of a token, after the chunk, that begins a new word or ends the text. A
    chunk has a probable end if this probability is above the threshold (gamma in the paper). The last chunk of a row
    always ends a group. Raises UserError for an unknown policy, and if boundaries are missing that the policy needs.
    """
    if policy not in POLICIES:
        raise UserError(f"Chunk policy {policy!r} is unknown; choose one of {', '.join(POLICIES)}.")
    index = torch.arange(len(row), device=row.device)
    if policy in ("all", "space"):
        return ChunkGroups(index, index, debiased=False)
    if teacher_boundary_log_probs is None:
        raise UserError(
            f"Chunk policy {policy} needs the teacher's probability of a boundary after each chunk, which "
            "this teacher does not give. Use policy all or space.",
            because="not built",
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

    In the unit of the divergence. It is not multiplied by the temperature or its square, so that gradients shrink with
    1 / temperature. It is a lower bound of the divergence over all texts (data-processing inequality).
    """
    return divergence(_outcomes(student_log_probs, temperature), _outcomes(teacher_log_probs, temperature))


def binary_kl_limit(
    student_log_probs: Float[Tensor, "*item"], teacher_log_probs: Float[Tensor, "*item"]
) -> Float[Tensor, "*item"]:
    """temperature * KL of the binarised chunks in nats, as the temperature goes to infinity (ALM, section 3).

    With a, b the negative log-likelihoods of teacher and student: a log(a / b) - a + b, the KL of two Poisson
    distributions with these rates.
    """
    # A chunk that is certain has a = 0, where a log a has no derivative.
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
    """Half the squared log-ratio: a biased estimate of a KL with low variance (joschu.net/blog/kl-approx.html)."""
    return ((teacher_log_probs - student_log_probs) / temperature).square() / 2


def joschu_k3(
    student_log_probs: Float[Tensor, "*item"], teacher_log_probs: Float[Tensor, "*item"], temperature: float = 1.0
) -> Float[Tensor, "*item"]:
    """r - 1 - log r with r = teacher / student, an unbiased estimate of KL(student || teacher) by student samples.

    Above r = e^20 it is continued linearly in log r, so that it stays finite.
    """
    log_ratio = (teacher_log_probs - student_log_probs) / temperature
    beyond = (log_ratio - _LARGEST_EXPONENT).clamp(min=0)
    # expm1, because near a ratio of 1, where a trained student is, r - 1 and log r cancel to the last digits.
    ratio_less_one = log_ratio.clamp(max=_LARGEST_EXPONENT).expm1()
    return ratio_less_one + math.exp(_LARGEST_EXPONENT) * beyond - log_ratio


def _outcomes(log_probs: Tensor, temperature: float) -> Float[Tensor, "chunk 2"]:
    log_probs = log_probs / temperature
    return torch.stack([log_probs, log_one_minus_exp(log_probs)], dim=-1)
