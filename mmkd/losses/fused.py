"""lm_head and divergence in one pass over chunks of tokens, with the gradients computed in the forward pass.

The logits of a language model are its largest tensor: 4,096 tokens of a 152k vocabulary are 1.2 GB in bf16, for the
student, again for the teacher, and as much for their gradients. Here they exist for one chunk of tokens at a time:
project, compare, differentiate, multiply back into the gradients of hidden states and head, and discard.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .divergences import entropy, forward_kl
from .narrowed import NarrowedOutcomes
from .projection import Head, HeadGradients, LogitsChunk, Projection, ReadyGradients, check_labels

Objective = Callable[[Tensor, Tensor], Tensor | tuple[Tensor, dict[str, Tensor]]]
"""(student log-probs, teacher log-probs) -> nats per token, optionally with more values per token to report."""


class Outcomes(Protocol):
    """The teacher's distributions for one chunk of tokens."""

    whole_vocabulary: ClassVar[bool]
    """Whether the compared outcomes are the tokens of the vocabulary, in its order."""

    def compare(self, logits: Tensor, rows: slice, temperature: float) -> tuple[Tensor, Tensor]:
        """Student and teacher log-probs of the outcomes that the teacher covers, for some rows of the chunk."""
        ...

    def top1(self, rows: slice) -> Tensor:
        """The teacher's most likely token of some rows of the chunk."""
        ...


@dataclass(frozen=True)
class Share:
    """The distributions of one of several teachers for a chunk, and their weight in the loss."""

    teacher: str
    weight: float
    outcomes: Outcomes


class Targets(Protocol):
    """The teacher's distributions for all tokens, such as the token signals of `mmkd.teachers.signals`."""

    def chunks(self, size: int) -> Iterator[Outcomes]:
        """The outcomes of `size` tokens at a time; a chunk is valid until the next one is requested."""
        ...


class MixedTargets(Protocol):
    """The distributions of several teachers for all tokens."""

    def chunks(self, size: int) -> Iterator[Sequence[Share]]:
        """The shares of `size` tokens at a time; a chunk is valid until the next one is requested."""
        ...


@dataclass
class FusedLoss:
    """Sums over the tokens, in nats unless stated otherwise. `total` carries the gradient; `sums` are for reports."""

    total: Float[Tensor, ""]
    sums: dict[str, Float[Tensor, ""]]


def fused_loss(
    hidden: Float[Tensor, "token width"],
    head: Head,
    labels: Int[Tensor, "token"],
    targets: Targets | MixedTargets | None = None,
    objective: Objective = forward_kl,
    *,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    chunk_size: int = 512,
    precise: bool = False,
    diagnostics: bool = False,
    repeatable: bool = False,
    weights: Float[Tensor, "token"] | None = None,
) -> FusedLoss:
    """Sum over tokens of `(1 - ce_weight) * temperature**2 * objective + ce_weight * cross-entropy`.

    Row i of `hidden` predicts `labels[i]`: shift and mask before the call. Memory is the gradient of the head plus one
    chunk of logits per model, whatever the number of tokens. Without `targets` the cross-entropy is the whole loss.
    With `weights` each token's loss is multiplied by its weight; what is reported of it is not.

    Matrix products run in the autocast type, or else in the type of the head. `precise` computes logits in fp32 (bf16
    logits are off by up to 0.06 nats at a magnitude of 16) and sums the gradient of the head in fp32. The comparison
    is always in fp32. `diagnostics` adds the sums "ce", "token_accuracy" (tokens), "student_entropy" and, with
    targets, "kl" to the teacher at temperature 1, "top1_agreement" (tokens) and "teacher_entropy". With several
    teachers (targets whose chunks are shares), objective and diagnostics are weighted means, and "kl_NAME" is the KL
    to each teacher.

    The gradient is ready when the call returns. It serves one backward pass, or with `repeatable` as many as the graph
    is kept for, each of which copies the head's gradient. Raises UserError for a label outside the head's vocabulary.
    """
    check_labels(labels, head.vocab_size)
    ce_weight = ce_weight if targets is not None else 1.0
    job = _Job(head, labels, targets, objective, temperature, ce_weight, chunk_size, precise, diagnostics, weights)
    if torch.is_grad_enabled():
        total: Tensor = cast(Any, _FusedLoss).apply(hidden, head.weight, head.bias, job, repeatable)
    else:
        total = job.run(hidden, (False, False, False))[0]
    return FusedLoss(total, job.sums)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: "_Job", repeatable: bool
    ) -> Tensor:
        total, *gradients = job.run(hidden, ctx.needs_input_grad[:3])
        ctx.gradients = ReadyGradients(gradients, repeatable)
        return total

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_total: Tensor
    ) -> tuple[Tensor | None, ...]:
        return *ctx.gradients.scaled(grad_total), None, None


@dataclass
class _Job:
    """One call of `fused_loss`: goes through the chunks, sums losses, and overwrites logits with their gradients."""

    head: Head
    labels: Tensor
    targets: Targets | MixedTargets | None
    objective: Objective
    temperature: float
    ce_weight: float
    chunk_size: int
    precise: bool
    diagnostics: bool
    weights: Tensor | None
    sums: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def run(
        self, hidden: Tensor, needs: tuple[bool, ...]
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The total and the gradients of hidden, weight and bias; a gradient is None if `needs` is false for it."""
        projection = Projection.here(hidden, self.head, self.chunk_size, self.precise)
        gradients = HeadGradients.zeros(projection, hidden, needs)
        total = torch.zeros((), dtype=projection.wide, device=hidden.device)
        outcomes = iter(()) if self.targets is None else self.targets.chunks(self.chunk_size)
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in projection.chunks(hidden):
                total += self._compare_chunk(chunk, _shares(next(outcomes, None)), any(needs))
                if any(needs):
                    gradients.accumulate(chunk)
        return total, *gradients.result(self.head)

    def _compare_chunk(self, chunk: LogitsChunk, shares: Sequence[Share], differentiate: bool) -> Tensor:
        """The chunk's loss; with `differentiate`, its gradient overwrites the logits."""
        logits, labels = chunk.logits, self.labels[chunk.rows]
        weights = None if self.weights is None else self.weights[chunk.rows]
        wide = torch.promote_types(logits.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=logits.device)
        for rows in chunk.tiles():
            leaf = logits[rows].to(wide).requires_grad_(differentiate)
            # Each tile has a graph of its own, so that the temporaries of one tile exist at a time.
            with torch.set_grad_enabled(differentiate):
                loss = self._compare(leaf, labels[rows], shares, rows, None if weights is None else weights[rows])
            if differentiate:
                logits[rows] = torch.autograd.grad(loss, leaf)[0]
            total += loss.detach()
        return total

    def _compare(
        self, leaf: Tensor, labels: Tensor, shares: Sequence[Share], rows: slice, weights: Tensor | None
    ) -> Tensor:
        logits = self.head.finish(leaf)
        loss = logits.new_zeros(())
        # At temperature 1 and over the whole vocabulary, the compared log-probs serve cross-entropy and diagnostics
        # too.
        log_probs: Tensor | None = None
        teachers: dict[str, Tensor] = {}
        for share in shares if self.ce_weight < 1 else ():
            student, target = share.outcomes.compare(logits, rows, self.temperature)
            if self.temperature == 1 and share.outcomes.whole_vocabulary:
                log_probs, teachers[share.teacher] = student, target
            result = self.objective(student, target)
            divergence, extra = result if isinstance(result, tuple) else (result, {})
            factor = share.weight * self.temperature**2
            reported = {name: share.weight * values.sum() for name, values in extra.items()}
            self._add(divergence=factor * divergence.sum(), **reported)
            loss = loss + (1 - self.ce_weight) * factor * _weighted_sum(divergence, weights)
        if log_probs is None and (self.ce_weight or self.diagnostics):
            log_probs = logits.log_softmax(-1)
        if self.ce_weight and log_probs is not None:
            cross_entropy = -log_probs.gather(-1, labels[:, None])[:, 0]
            self._add(ce=cross_entropy.sum())
            loss = loss + self.ce_weight * _weighted_sum(cross_entropy, weights)
        if self.diagnostics and log_probs is not None:
            self._diagnose(logits.detach(), log_probs.detach(), labels)
            for share in map(_diagnosed, shares):
                if share is not None:
                    teacher = teachers.get(share.teacher)
                    self._diagnose_teacher(share, logits.detach(), log_probs.detach(), teacher, rows)
        return loss

    @torch.no_grad()
    def _diagnose(self, logits: Tensor, log_probs: Tensor, labels: Tensor) -> None:
        self._add(student_entropy=entropy(log_probs).sum(), token_accuracy=(logits.argmax(-1) == labels).sum())
        if not self.ce_weight:
            self._add(ce=-log_probs.gather(-1, labels[:, None]).sum())

    @torch.no_grad()
    def _diagnose_teacher(
        self, share: Share, logits: Tensor, log_probs: Tensor, teacher: Tensor | None, rows: slice
    ) -> None:
        outcomes, weight = share.outcomes, share.weight
        student, teacher = (log_probs, teacher) if teacher is not None else outcomes.compare(logits, rows, 1.0)
        kl = forward_kl(student, teacher).sum()
        self._add(
            kl=weight * kl,
            teacher_entropy=weight * entropy(teacher).sum(),
            top1_agreement=weight * (logits.argmax(-1) == outcomes.top1(rows)).sum(),
            **({f"kl_{share.teacher}": kl} if share.teacher else {}),
        )

    def _add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value.detach() if name in self.sums else value.detach()


def _weighted_sum(values: Tensor, weights: Tensor | None) -> Tensor:
    return values.sum() if weights is None else (weights * values).sum()


def _diagnosed(share: Share) -> Share | None:
    """The share with the teacher's distributions as a whole; None where these are not known."""
    outcomes = share.outcomes
    if not isinstance(outcomes, NarrowedOutcomes):
        return share
    return None if outcomes.whole is None else replace(share, outcomes=outcomes.whole)


def _shares(outcomes: Outcomes | Sequence[Share] | None) -> Sequence[Share]:
    """The shares of all teachers; a single teacher has no name and the integer weight 1, so counts stay integers."""
    if outcomes is None:
        return ()
    return outcomes if isinstance(outcomes, Sequence) else (Share("", 1, outcomes),)
