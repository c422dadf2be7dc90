"""Batch: one typed value from the collator to the loss. What each model reads, and what is known of the answers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmkd.errors import UserError

from .signals import ChunkAlignment, ChunkSignal
from .vllm_rows import ServedRow as ServedRow

Targets = Mapping[str, Tensor]
"""What a teacher on disk said about the supervised tokens of a view, by the field of its signal."""

ONLY = ""
"""The name under which the targets of the only teacher stand."""


@dataclass(frozen=True, eq=False)
class RolloutTokens:
    """What is known of the tokens that the student said itself, at the positions of a view or at some of them.

    Where a token is not the student's own, its log-prob and its advantage are 0.
    """

    own: Bool[Tensor, "*place"]
    """Which tokens the student sampled itself."""
    log_probs: Float[Tensor, "*place"] | None = None
    """Log-prob of each token by the student that sampled it: of its whole distribution at temperature 1, whatever
    rollout_temperature and rollout_top_p are. None where the student sampled them in this process, with the weights of
    this very step: these are then its log-probs in the step itself."""
    advantages: Float[Tensor, "*place"] | None = None
    """By how much the reward of the token's rollout is above what was expected; None without a reward."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with every tensor changed."""
        return replace(
            self,
            own=change(self.own),
            log_probs=None if self.log_probs is None else change(self.log_probs),
            advantages=None if self.advantages is None else change(self.advantages),
        )


@dataclass(frozen=True, eq=False)
class View(Mapping[str, Any]):
    """A micro-batch as one model sees it; as a mapping it is the keyword arguments of the model's forward."""

    inputs: Mapping[str, Any]
    labels: Int[Tensor, "batch position"]
    visual_tokens: Bool[Tensor, "batch position"] | None = None
    """Which positions stand for a piece of an image; None where rows have no images."""
    image_tokens: Int[Tensor, "image 2"] | None = None
    """Row and number of visual tokens of each image, in the order of the rows."""
    targets: Mapping[str, Targets] = field(default_factory=dict[str, Targets])
    """What the teachers on disk said, by the teacher's name."""
    route: Int[Tensor, "batch position"] | None = None
    """The number of the teacher of each token, or of each row in one column, where rows name theirs."""
    served: Sequence[ServedRow | None] | None = None
    """The rows as a server is asked about them, None for those without images; only where a server is the teacher."""
    rollout: RolloutTokens | None = None
    """Which tokens are rollouts, where some rows are answered by the student itself."""

    @classmethod
    def of(cls, collated: Mapping[str, Any]) -> Self:
        """The view of what a collator of one model made: its inputs and, apart from them, its labels."""
        return cls({name: value for name, value in collated.items() if name != "labels"}, collated["labels"])

    def __getitem__(self, name: str) -> Any:
        return self.inputs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.inputs)

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def supervised(self) -> Bool[Tensor, "batch position-1"]:
        """The positions that predict a supervised token."""
        return self.labels[:, 1:] != -100

    @property
    def own(self) -> Bool[Tensor, "batch position-1"]:
        """The positions that predict a supervised token which the student said itself."""
        supervised = self.supervised
        return torch.zeros_like(supervised) if self.rollout is None else supervised & self.rollout.own[:, 1:]

    @property
    def visual(self) -> Bool[Tensor, "batch position"]:
        """The visual tokens of rows that are learnt from: ranks repeat rows at the end of an evaluation."""
        if self.visual_tokens is None:
            return torch.zeros_like(self.labels, dtype=torch.bool)
        return self.visual_tokens & self.supervised.any(1)[:, None]

    @property
    def images(self) -> Int[Tensor, "image 2"]:
        """Row and number of visual tokens of each image of a row that is learnt from."""
        if self.image_tokens is None:
            return self.labels.new_zeros(0, 2)
        return self.image_tokens[self.supervised.any(1)[self.image_tokens[:, 0]]]

    @property
    def image_runs(self) -> Int[Tensor, "run"]:
        """The lengths of the visual tokens without a token between them: whole images, or tiles of them."""
        edges = torch.diff(torch.nn.functional.pad(self.visual.int(), (1, 1)))
        return (edges == -1).nonzero()[:, 1] - (edges == 1).nonzero()[:, 1]

    def learnt_from(self, chosen: Bool[Tensor, "batch position"]) -> Self:
        """The view in which only the chosen tokens, or rows where there is one column, have labels."""
        return replace(self, labels=self.labels.masked_fill(~chosen, -100))

    def taught_as_much_as(self, other: "View") -> Self:
        """The view in which each row keeps the labels of as many tokens, from its first on, as it has in another."""
        most = (other.labels != -100).sum(1, keepdim=True)
        return self.learnt_from((self.labels != -100).cumsum(1) <= most)

    def of_rows(self, rows: Bool[Tensor, "batch"]) -> Self:
        """The view of some rows without images; what is not about rows stays."""
        inputs = {
            name: value[rows] if isinstance(value, Tensor) and len(value) == len(rows) else value
            for name, value in self.inputs.items()
        }
        served = self.served
        if served is not None:
            served = [row for row, kept in zip(served, rows, strict=True) if kept]
        # None of a student that sees images is set, but they are counted by the row.
        visual = None if self.visual_tokens is None else self.visual_tokens[rows]
        rollout = None if self.rollout is None else self.rollout.map(lambda tensor: tensor[rows])
        changed = {"inputs": inputs, "labels": self.labels[rows], "visual_tokens": visual}
        return replace(self, **changed, served=served, rollout=rollout)

    def targets_of(self, name: str) -> Self:
        """The view as the teacher of this name is asked about it."""
        return replace(self, targets={ONLY: self.targets[name]} if name in self.targets else {}, route=None)

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The view with every tensor changed, moved to a device say."""
        return replace(
            self,
            inputs={
                name: change(value) if isinstance(value, Tensor) else value for name, value in self.inputs.items()
            },
            labels=change(self.labels),
            visual_tokens=None if self.visual_tokens is None else change(self.visual_tokens),
            image_tokens=None if self.image_tokens is None else change(self.image_tokens),
            targets={
                teacher: {name: change(tensor) for name, tensor in targets.items()}
                for teacher, targets in self.targets.items()
            },
            route=None if self.route is None else change(self.route),
            rollout=None if self.rollout is None else self.rollout.map(change),
        )


@dataclass(frozen=True, eq=False)
class Reading:
    """A micro-batch as a teacher reads it that does not read what the student reads."""

    view: View
    alignment: ChunkAlignment | None = None
    """Which tokens of the two views make up the same text, where their tokens differ."""
    signal: ChunkSignal | None = None
    """What the teacher said, where the number of items depends on it."""

    def aligned(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The reading with every tensor of its alignment changed."""
        return self if self.alignment is None else replace(self, alignment=self.alignment.map(change))


@dataclass(frozen=True, eq=False)
class Batch(Mapping[str, Any]):
    """A micro-batch: rows as student and teacher see them.

    As a mapping it is what transformers' Trainer looks for in a batch: the student's inputs and its labels.
    """

    student: View
    row_lengths: Int[Tensor, "row"]
    """How many tokens each row has, 0 for one that only keeps ranks together."""
    readings: Mapping[str, Reading] = field(default_factory=dict[str, Reading])
    """What teachers read, by their names, where that is not what the student reads. Those alike share one view."""
    skipped: Int[Tensor, "kind"] | None = None
    """How many rows others stand for, by what was wrong with them."""
    rows: Sequence[Mapping[str, Any]] = ()
    """The rows themselves, where the student may answer them anew."""
    retokenised: int = 0
    """How many rollouts about images a server makes other tokens of."""
    asked: Any = None
    """What the teacher said, where it was asked before the step."""

    def __getitem__(self, name: str) -> Any:
        return self.student.labels if name == "labels" else self.student.inputs[name]

    def __iter__(self) -> Iterator[str]:
        yield from self.student.inputs
        yield "labels"

    def __len__(self) -> int:
        return len(self.student.inputs) + 1

    def with_labels(self, labels: Int[Tensor, "batch position"]) -> Self:
        """The batch in which the student learns from these labels."""
        return replace(self, student=replace(self.student, labels=labels))

    def teacher_view(self, teacher: str = ONLY) -> View:
        """What a teacher with the student's tokens reads: the student's view unless it has one of its own."""
        view = self.student
        if teacher in self.readings:
            # Rows without labels on our side, repeated at the end of an evaluation, have none on the other.
            view = self.in_sequences(self.readings[teacher].view, self.student.labels != -100)
        return view.targets_of(teacher)

    def in_sequences(self, view: View, chosen: Bool[Tensor, "batch position"]) -> View:
        """A teacher's view that has labels only in sequences of which a token of the student's is chosen.

        Rows laid end to end are the same sequences in both, each as long as it is there.
        """
        positions, others = (side.inputs.get("position_ids") for side in (self.student, view))
        if chosen.shape[1] == 1 or positions is None or others is None:
            rows = chosen if chosen.shape[1] == 1 else chosen[:, 1:]
            return view.learnt_from(rows.any(1)[:, None])
        ours, theirs = ((side == 0).cumsum(1) - 1 for side in (positions, others))
        sequences = int(max(ours.max(), theirs.max())) + 1
        # Nothing predicts the first token of a sequence.
        predicted = chosen & (positions != 0)
        some = chosen.new_zeros(len(chosen), sequences, dtype=torch.long).scatter_add(1, ours, predicted.long())
        return view.learnt_from(some.gather(1, theirs) > 0)

    def check_answers(self) -> None:
        """Raises UserError when a teacher with the student's tokens is supervised on others than the student."""
        for teacher in self.readings:
            answers = zip(_answers(self.student), _answers(self.teacher_view(teacher)), strict=True)
            for row, (ours, theirs) in enumerate(answers):
                if not torch.equal(ours, theirs):
                    whose = f"the teacher's ({teacher})" if teacher else "the teacher's"
                    raise UserError(
                        f"Row {row} of a batch is supervised on {len(ours)} tokens of the student's and {len(theirs)} "
                        f"of {whose}, or on different ones: their chat templates write an answer differently, prompts "
                        "are supervised too, or max_length cuts one of the two. Set assistant_only_loss: true (or "
                        "map the data to prompt and completion), give both templates that write the same answer, and "
                        "raise max_length."
                    )

    def with_teacher_views(self, change: Callable[[View], View]) -> Self:
        """The batch with every view of a teacher's own changed; teachers that share one still do."""
        changed: dict[int, View] = {}
        readings = {}
        for teacher, reading in self.readings.items():
            if id(reading.view) not in changed:
                changed[id(reading.view)] = change(reading.view)
            readings[teacher] = replace(reading, view=changed[id(reading.view)])
        return replace(self, readings=readings)

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The batch with every tensor changed but the signals, which are where they were made."""
        batch = self.with_teacher_views(lambda view: view.map(change))
        return replace(
            batch,
            student=self.student.map(change),
            row_lengths=change(self.row_lengths),
            readings={teacher: reading.aligned(change) for teacher, reading in batch.readings.items()},
            skipped=None if self.skipped is None else change(self.skipped),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The batch on a device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The batch in page-locked memory, as data loaders ask for it."""
        return self.map(lambda tensor: tensor.pin_memory())


def _answers(view: View) -> list[Int[Tensor, "token"]]:
    return [row[mask] for row, mask in zip(view.labels[:, 1:], view.supervised, strict=True)]
