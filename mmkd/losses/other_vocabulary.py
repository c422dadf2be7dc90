"""Targets from a teacher with another vocabulary: the baselines ULD and MinED.

Both compare aligned positions, at which student and teacher predict the same text: pair the rows of their hidden
states first. They wrap the targets of a teacher with a whole distribution, so that the fused loss computes them in
chunks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .divergences import tvd
from .fused import Outcomes, Targets


@dataclass(frozen=True)
class SortedTargets:
    """Both distributions sorted, so that outcomes are ranks; the smaller vocabulary is padded with probability 0.

    The targets of `uld`. Ranks are not tokens: the reported top-1 agreement is always 0, and the KL is over ranks.
    """

    targets: Targets

    def chunks(self, size: int) -> Iterator["_SortedOutcomes"]:
        for outcomes in self.targets.chunks(size):
            assert outcomes.whole_vocabulary, "other vocabularies need the whole distribution of the teacher"
            yield _SortedOutcomes(outcomes)


@dataclass(frozen=True)
class MappedTargets:
    """The teacher's probability of the teacher token nearest to each student token, renormalised (MinED).

    `teacher_tokens` comes from `mmkd.alignment.nearest_tokens`. Several student tokens may share a teacher token.
    """

    targets: Targets
    teacher_tokens: Int[Tensor, "vocab"]

    def chunks(self, size: int) -> Iterator["_MappedOutcomes"]:
        for outcomes in self.targets.chunks(size):
            assert outcomes.whole_vocabulary, "other vocabularies need the whole distribution of the teacher"
            yield _MappedOutcomes(outcomes, self.teacher_tokens)


def uld(
    student_log_probs: Float[Tensor, "*item rank"], teacher_log_probs: Float[Tensor, "*item rank"]
) -> Float[Tensor, "*item"]:
    """Universal logit distillation (2402.12030, eq. 5): the L1 distance of sorted probabilities, in [0, 2]."""
    return 2 * tvd(student_log_probs, teacher_log_probs)


@dataclass(frozen=True)
class _SortedOutcomes:
    whole_vocabulary: ClassVar[bool] = False
    outcomes: Outcomes

    def compare(self, logits: Tensor, rows: slice, temperature: float) -> tuple[Tensor, Tensor]:
        student, teacher = self.outcomes.compare(logits, rows, temperature)
        ranks = max(student.shape[-1], teacher.shape[-1])
        return _sorted(student, ranks), _sorted(teacher, ranks)

    def top1(self, rows: slice) -> Tensor:
        return torch.full_like(self.outcomes.top1(rows), -1)


@dataclass(frozen=True)
class _MappedOutcomes:
    whole_vocabulary: ClassVar[bool] = True
    outcomes: Outcomes
    teacher_tokens: Tensor

    def compare(self, logits: Tensor, rows: slice, temperature: float) -> tuple[Tensor, Tensor]:
        student, teacher = self.outcomes.compare(logits, rows, temperature)
        return student, teacher[:, self.teacher_tokens[: student.shape[-1]]].log_softmax(-1)

    def top1(self, rows: slice) -> Tensor:
        """The first student token whose teacher token is the teacher's most likely one, or -1."""
        matches = self.outcomes.top1(rows)[:, None] == self.teacher_tokens
        return torch.where(matches.any(-1), matches.int().argmax(-1), -1)


def _sorted(log_probs: Tensor, ranks: int) -> Tensor:
    # The smaller side is padded with impossible outcomes and not with logits of zero, which would be mass.
    # Padded with impossible outcomes: a logit of zero would have mass.
    descending = log_probs.sort(-1, descending=True).values
    return torch.nn.functional.pad(descending, (0, ranks - log_probs.shape[-1]), value=-torch.inf)
