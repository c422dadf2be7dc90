"""Targets seen through few outcomes: the student's most likely tokens with the rest as one, or the sampled token.

They wrap what a teacher tells, so that the fused loss projects, compares and differentiates as with whole
distributions, while its diagnostics stay those of the teacher as a whole.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .divergences import log_one_minus_exp
from .projection import starts

if TYPE_CHECKING:
    from .fused import Outcomes, Targets


@dataclass(frozen=True)
class NarrowedOutcomes:
    """Some outcomes of one chunk of tokens."""

    whole_vocabulary: ClassVar[bool] = False
    whole: "Outcomes | None"
    """The distributions that they are taken from, which diagnostics are about; None where nobody tells them."""
    compared: Callable[[Tensor, slice, float], tuple[Tensor, Tensor]]

    def compare(self, logits: Tensor, rows: slice, temperature: float) -> tuple[Tensor, Tensor]:
        """The log-probs of these outcomes by the student, and what is known of them."""
        return self.compared(logits, rows, temperature)

    def top1(self, rows: slice) -> Tensor:
        """The most likely token of the teacher as a whole."""
        assert self.whole is not None
        return self.whole.top1(rows)


@dataclass(frozen=True)
class StudentTopK:
    """The student's k most likely tokens and the rest as one outcome, the tail, for both distributions.

    Which tokens these are carries no gradient. Every divergence over the k + 1 outcomes is at most the divergence over
    all tokens, and with k = the vocabulary it is that divergence.
    """

    targets: "Targets"
    k: int

    def chunks(self, size: int) -> Iterator[NarrowedOutcomes]:
        """The outcomes of `size` tokens at a time."""
        for outcomes in self.targets.chunks(size):
            assert outcomes.whole_vocabulary, "the student's tokens are looked up in the teacher's whole distribution"

            def compared(
                logits: Tensor, rows: slice, temperature: float, outcomes: "Outcomes" = outcomes
            ) -> tuple[Tensor, Tensor]:
                student, teacher = outcomes.compare(logits, rows, temperature)
                if self.k >= student.shape[-1]:
                    return student, teacher
                ids = student.detach().topk(self.k).indices
                return _with_tail(student.gather(-1, ids)), _with_tail(teacher.gather(-1, ids))

            yield NarrowedOutcomes(outcomes, compared)


@dataclass(frozen=True)
class SampledTargets:
    """The tokens that the student sampled, as the only outcome of each position.

    The teacher tells either the log-prob of each (`told`) or its distributions (`targets`). With `sampling_log_probs`,
    those by the student that sampled them, what is known has a second column for them.
    """

    labels: Int[Tensor, "token"]
    told: Float[Tensor, "token"] | None = None
    targets: "Targets | None" = None
    sampling_log_probs: Float[Tensor, "token"] | None = None

    def chunks(self, size: int) -> Iterator[NarrowedOutcomes]:
        """The outcomes of `size` tokens at a time."""
        wholes = None if self.targets is None else self.targets.chunks(size)
        for start in starts(len(self.labels), size):
            whole = None if wholes is None else next(wholes)

            def compared(
                logits: Tensor, rows: slice, temperature: float, start: int = start, whole: "Outcomes | None" = whole
            ) -> tuple[Tensor, Tensor]:
                assert temperature == 1, "a sampled token was sampled at temperature 1"
                places = slice(start + rows.start, start + rows.stop)
                labels = self.labels[places, None]
                if whole is not None:
                    student, teacher = (part.gather(-1, labels) for part in whole.compare(logits, rows, 1.0))
                else:
                    assert self.told is not None
                    student = logits.gather(-1, labels) - logits.logsumexp(-1, keepdim=True)
                    teacher = self.told[places, None].to(student)
                if self.sampling_log_probs is None:
                    return student, teacher
                return student, torch.cat([teacher, self.sampling_log_probs[places, None].to(student)], -1)

            yield NarrowedOutcomes(whole, compared)


def _with_tail(log_probs: Float[Tensor, "token outcome"]) -> Float[Tensor, "token outcome_and_tail"]:
    return torch.cat([log_probs, log_one_minus_exp(log_probs.logsumexp(-1, keepdim=True))], -1)
