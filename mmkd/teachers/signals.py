"""What a teacher says about a batch: frozen values that know how to put the student on their own support."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmkd.errors import UserError
from mmkd.losses.divergences import log_one_minus_exp
from mmkd.losses.fused import Share, Targets
from mmkd.losses.narrowed import NarrowedOutcomes
from mmkd.losses.projection import starts
from mmkd.models.heads import LMHead

Signal = TypeVar("Signal")
Other = TypeVar("Other")


@dataclass(frozen=True)
class DenseSignal:
    """The teacher's last hidden states and head: its whole distribution, formed one chunk of tokens at a time."""

    hidden: Float[Tensor, "token width"]
    head: LMHead

    def chunks(self, size: int) -> Iterator["_DenseChunk"]:
        """The teacher's logits of `size` tokens at a time, in one buffer that the next chunk overwrites."""
        head = self.head.frozen()
        states = self.hidden.detach().to(head.weight.dtype)
        buffer = states.new_empty(min(size, len(states)), head.vocab_size)
        for start in starts(len(states), size):
            chunk = states[start : start + size]
            yield _DenseChunk(head.project(chunk, buffer[: len(chunk)]), head)


@dataclass(frozen=True)
class _DenseChunk:
    whole_vocabulary: ClassVar[bool] = True
    logits: Float[Tensor, "token vocab"]
    head: LMHead

    def compare(self, logits: Tensor, rows: slice, temperature: float) -> tuple[Tensor, Tensor]:
        teacher = self.head.finish(self.logits[rows].to(logits.dtype))
        if temperature != 1:
            logits, teacher = logits / temperature, teacher / temperature
        return logits.log_softmax(-1), teacher.log_softmax(-1)

    def top1(self, rows: slice) -> Tensor:
        return self.logits[rows].argmax(-1)


@dataclass(frozen=True)
class RawSignal:
    """A teacher's logits and not its log-probs, for losses of the logits themselves. The temperature is not used."""

    signal: DenseSignal

    def chunks(self, size: int) -> Iterator[NarrowedOutcomes]:
        """The logits of `size` tokens at a time."""
        for chunk in self.signal.chunks(size):

            def compared(
                logits: Tensor, rows: slice, temperature: float, chunk: _DenseChunk = chunk
            ) -> tuple[Tensor, Tensor]:
                return logits, chunk.head.finish(chunk.logits[rows].to(logits.dtype))

            yield NarrowedOutcomes(chunk, compared)


@dataclass(frozen=True)
class SparseSignal:
    """The teacher's probabilities of some tokens per position, the most likely first, every other token having none.

    Either its top-k renormalised, or its top-k and draws that stand for the tail (-inf for a draw counted elsewhere).
    The student is compared by its log-probs on the whole vocabulary, which do not sum to 1 over these tokens: only the
    forward KL, which is linear in the teacher's probabilities, has a right gradient (RS-KD, 2503.16870).
    """

    whole_vocabulary: ClassVar[bool] = False
    ids: Int[Tensor, "token outcome"]
    log_probs: Float[Tensor, "token outcome"]

    def chunks(self, size: int) -> Iterator["SparseSignal"]:
        """This signal, `size` tokens at a time."""
        for start in starts(len(self.ids), size):
            yield self[slice(start, start + size)]

    def compare(self, logits: Tensor, rows: slice, temperature: float) -> tuple[Tensor, Tensor]:
        signal = self[rows]
        teacher = signal.log_probs.to(logits)
        if temperature != 1:
            # Exact for a renormalised top-k; teachers of other sparse signals do not let themselves be tempered.
            logits, teacher = logits / temperature, (teacher / temperature).log_softmax(-1)
        return logits.gather(-1, signal.ids.long()) - logits.logsumexp(-1, keepdim=True), teacher

    def top1(self, rows: slice) -> Tensor:
        return self.ids[rows, 0]

    def __getitem__(self, rows: slice | Bool[Tensor, "token"]) -> Self:
        def cut(part: Any) -> Any:
            return None if part is None else part[rows]

        return type(self)(*(cut(getattr(self, field.name)) for field in fields(self)))


@dataclass(frozen=True)
class TopKSignal(SparseSignal):
    """The teacher's k most likely tokens, most likely first, their log-probs and the rest as one outcome, the tail.

    The k + 1 outcomes are the teacher's distribution seen through "one of these, or none"; the student is compared on
    the same outcomes, so that every divergence is one. The probabilities are the teacher's at temperature 1 and cannot
    be tempered: the shape of the tail is not known.
    """

    tail_log_probs: Float[Tensor, "token"]
    label_log_probs: Float[Tensor, "token"] | None = None
    """Those of the supervised tokens themselves, listed or not; None where they were not kept."""

    def compare(self, logits: Tensor, rows: slice, temperature: float) -> tuple[Tensor, Tensor]:
        if temperature != 1:
            raise UserError(
                f"A top-k signal is known at temperature 1 only, not at {temperature}; set temperature: 1.",
                because="meaning",
            )
        inside, teacher = super().compare(logits, rows, 1)
        student = torch.cat([inside, log_one_minus_exp(inside.logsumexp(-1, keepdim=True))], dim=-1)
        return student, torch.cat([teacher, self.tail_log_probs[rows, None].to(teacher)], dim=-1)


@dataclass(frozen=True)
class ListedSignal:
    """The tokens that a teacher lists and no others, for losses of the differences between log-probs.

    Differences need no tail and no normaliser, so that they are known at any temperature.
    """

    signal: SparseSignal

    def chunks(self, size: int) -> Iterator[NarrowedOutcomes]:
        """The outcomes of `size` tokens at a time."""
        for chunk in self.signal.chunks(size):

            def compared(
                logits: Tensor, rows: slice, temperature: float, listed: SparseSignal = chunk
            ) -> tuple[Tensor, Tensor]:
                ids, log_probs = listed.ids[rows].long(), listed.log_probs[rows].to(logits)
                return logits.gather(-1, ids) / temperature, log_probs / temperature

            yield NarrowedOutcomes(chunk, compared)


@dataclass(frozen=True)
class MixedSignal(Generic[Signal]):
    """What several teachers, by name, say about the same tokens, each with its share of the loss."""

    signals: Mapping[str, Signal]
    weights: Mapping[str, float]

    @classmethod
    def of(cls, signal: "Signal | MixedSignal[Signal]") -> "MixedSignal[Signal]":
        """The signal of the only teacher as one of several: without a name, and the whole of the loss."""
        if isinstance(signal, MixedSignal):
            return cast("MixedSignal[Signal]", signal)
        return cls({"": signal}, {"": 1})

    def map(self, change: Callable[[Signal], Other]) -> "MixedSignal[Other]":
        """Something else of what each says."""
        return MixedSignal({name: change(signal) for name, signal in self.signals.items()}, self.weights)

    def chunks(self: "MixedSignal[Targets]", size: int) -> Iterator[list[Share]]:
        """The shares of `size` tokens at a time."""
        for outcomes in zip(*(signal.chunks(size) for signal in self.signals.values()), strict=True):
            yield [
                Share(name, self.weights[name], entries) for name, entries in zip(self.signals, outcomes, strict=True)
            ]


@dataclass(frozen=True)
class RoutedSignal(Generic[Signal]):
    """What several teachers, by name, say each about its own tokens."""

    signals: Mapping[str, Signal]
    masks: Mapping[str, Bool[Tensor, "batch position"]]
    """The student's tokens that each teaches, or rows in one column."""


@dataclass(frozen=True)
class LabelSignal:
    """How likely the teacher found each supervised token of its own tokenisation, and nothing of other tokens."""

    log_probs: Float[Tensor, "token"]
    boundary_log_probs: Float[Tensor, "token"] | None = None
    """The probability that a new word begins there or the text ends, where the teacher tells it."""


@dataclass(frozen=True)
class ChunkAlignment:
    """Which tokens of a batch make up the same text on both sides; a token is named by its place among the supervised.

    Chunks are in the order of the text, all of one sequence before those of the next.
    """

    student_chunk: Int[Tensor, "student_token"]
    """The chunk of each of the student's tokens, -1 for none."""
    teacher_chunk: Int[Tensor, "teacher_token"]
    student_next: Int[Tensor, "chunk"]
    """The token after each chunk of text, -1 on both sides where one of them has none, and after markers."""
    teacher_next: Int[Tensor, "chunk"]
    row: Int[Tensor, "chunk"]
    """The sequence of the batch that each chunk is from."""

    def __len__(self) -> int:
        return len(self.row)

    def map(self, change: Callable[[Tensor], Tensor]) -> "ChunkAlignment":
        """The alignment with every tensor changed, moved to a device say."""
        return ChunkAlignment(*(change(getattr(self, part.name)) for part in fields(self)))

    def first_tokens(self) -> tuple[Int[Tensor, "chunk"], Int[Tensor, "chunk"]]:
        """The student's and the teacher's first token of each chunk."""
        return _first(self.student_chunk, len(self)), _first(self.teacher_chunk, len(self))

    def of_first_tokens(self, tokens: int) -> "ChunkAlignment":
        """What is left when only the first of the student's tokens count."""
        if tokens == len(self.student_chunk):
            return self
        student_chunk = self.student_chunk[:tokens]
        chunks = int(student_chunk.max()) + 1 if tokens else 0
        teacher_chunk = self.teacher_chunk.where(self.teacher_chunk < chunks, -1)
        rest = (self.student_next[:chunks], self.teacher_next[:chunks], self.row[:chunks])
        return ChunkAlignment(student_chunk, teacher_chunk, *rest)


def _first(chunk: Tensor, chunks: int) -> Tensor:
    places = torch.arange(len(chunk), device=chunk.device)
    slot = torch.where(chunk < 0, chunks, chunk)
    return places.new_full((chunks + 1,), len(chunk)).scatter_reduce(0, slot, places, "amin")[:chunks]


@dataclass(frozen=True)
class ChunkSignal:
    """How likely the teacher found each chunk of text, whatever the tokens that it is made of."""

    log_probs: Float[Tensor, "chunk"]
    alignment: ChunkAlignment
    boundary_log_probs: Float[Tensor, "chunk"] | None = None
    """The teacher's probability, after each chunk, of a token that begins a new word or ends the text."""
    dense: DenseSignal | None = None
    """The teacher at its own supervised tokens, where it is a model in this process."""
    teacher: str = ""
    """Its name among several."""

    def without_states(self) -> "ChunkSignal":
        """The numbers of chunks alone, which are small."""
        return replace(self, dense=None)

    def of_first_tokens(self, tokens: int) -> "ChunkSignal":
        """What is left when only the first of the student's tokens count."""
        alignment = self.alignment.of_first_tokens(tokens)
        boundary = None if self.boundary_log_probs is None else self.boundary_log_probs[: len(alignment)]
        log_probs = self.log_probs[: len(alignment)]
        return replace(self, log_probs=log_probs, alignment=alignment, boundary_log_probs=boundary)
