"""What a method adds to a trainer."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.trainer_callback import TrainerCallback

from mmkd.errors import UserError
from mmkd.models.heads import LMHead
from mmkd.models.load import tokenizer_of
from mmkd.preparation.labelling import Labelling
from mmkd.teachers.batch import ONLY, Batch, View
from mmkd.teachers.several import asked, is_routed, pairs_of, parts_of
from mmkd.teachers.signals import DenseSignal, MixedSignal, RoutedSignal, TopKSignal
from mmkd.teachers.teacher import Teacher

from .answers import Placed
from .config import DistillationConfig
from .items import DATA_TOKEN, ItemLosses, ReadStudent, Supervised, kind_of
from .quantised_training import QuantisedTrainer
from .rewards import REWARD, policy_gradient
from .rollout_trainer import RolloutTrainer
from .self_teaching import SelfTaughtTrainer
from .served_rollouts import as_served
from .teaching import StudentSide, Teaching, teaching_of
from .term_trainer import TermTrainer

ROUTER = "router"
"""The kind of item of which a micro-batch has one: the load-balancing loss of a mixture of experts."""

Signal = TypeVar("Signal")
"""What a method reads of its teacher."""


class MethodTrainer(QuantisedTrainer, SelfTaughtTrainer, RolloutTrainer, TermTrainer, Generic[Signal]):
    """The hooks that a method overrides, of which it must write `item_losses`, and what it calls in them."""

    method: ClassVar[str]
    config_class: ClassVar[type[DistillationConfig]] = DistillationConfig
    accepts: ClassVar[tuple[type, ...]] = (DenseSignal, TopKSignal)
    one_vocabulary: ClassVar[bool] = True
    """Whether a token must be the same to student and teacher."""
    reports_by_teacher: tuple[str, ...] = ("kl",)
    """Reports that, where rows name their teachers, are logged for each teacher too, as REPORT_NAME."""
    reads_visual_tokens: ClassVar[bool] = False
    """Whether the teacher is also asked about its states at visual tokens."""

    # transformers types these as unions with None, for trainers that are still without them.
    args: DistillationConfig
    model: Any
    teacher: Any
    labelling: Labelling
    student_side: StudentSide

    # What a method implements

    def item_losses(self, student: Supervised, signal: Signal) -> ItemLosses:
        """The losses of one micro-batch; runs inside the student's forward. `signal` is None without a teacher."""
        raise NotImplementedError

    @classmethod
    def check_teacher(cls, teacher: Teacher, args: Any) -> None:
        """Raises UserError when the teacher does not answer with a signal that this method can learn from."""
        if not issubclass(teacher.signal_type, cls.accepts):
            accepted = " or ".join(signal.__name__ for signal in cls.accepts)
            otherwise = "Use another teacher or another method."
            if teacher.served and DenseSignal in cls.accepts:
                otherwise = "Serve its hidden states (scripts/serve_teacher.sh MODEL --signal hidden)."
            raise UserError(
                f"{type(teacher).__name__} answers with {teacher.signal_type.__name__}, method {cls.method} needs "
                f"{accepted}. {otherwise}",
                because="not built",
            )

    def build_teacher(self, student: StudentSide, teacher: Any, processing_class: Any) -> Teaching:
        """The teacher of the constructor's arguments, fitted to the student, and what follows from it."""
        return teaching_of(student, teacher, processing_class)

    def method_callbacks(self, args: Any) -> list[TrainerCallback]:
        """Callbacks of the method; those that are ExportableState are saved in and restored from the trainer state."""
        return []

    def ask(self, batch: Batch) -> Signal | MixedSignal[Signal] | RoutedSignal[Signal] | None:
        """What the teacher says about a batch, or each of several; None where nobody is asked."""
        if self.teacher is None or batch.asked is not None:
            return batch.asked
        batch.check_answers()
        return asked(self.teacher, batch, self.listen)

    def early_question(self) -> Callable[[Batch], Batch] | None:
        """That of servers, about tokens that are the student's as they are: of rows without images."""
        served = all(isinstance(part, Teacher) and part.served for part in parts_of(self.teacher))
        as_they_are = self.one_vocabulary and not self.labelling.vision
        return (lambda batch: replace(batch, asked=self.ask(batch))) if served and as_they_are else None

    def ask_teacher(self, teacher: Teacher[Any], name: str, view: View) -> Signal:
        """What a teacher says about what it reads; `name` is its name among several."""
        return teacher.ask(view, view.supervised)

    def part_losses(
        self, read: ReadStudent, signal: Any, name: str = ONLY, chosen: Tensor | None = None
    ) -> ItemLosses:
        """The losses of the method, of all tokens, or of the chosen ones for which a teacher of this name speaks."""
        return self.item_losses(read(chosen), signal)

    def listen(self, teacher: Teacher[Any], name: str, view: View) -> Any:
        """`ask_teacher` in a step, where more may be taken from the teacher than it says."""
        return self.ask_teacher(teacher, name, view)

    def with_rollouts(self, batch: Batch, placed: Mapping[int, Placed]) -> Batch:
        """A micro-batch whose rollouts (row -> rollout) are in place, as the method's teacher reads it."""
        processing_class: Any = self.processing_class
        return as_served(batch, placed, self.teacher, tokenizer_of(processing_class), self.student_side.views)

    def ask_ahead(self, batch: Batch, alone: bool) -> Batch:
        """The batch with what the teacher must have said before its items can be counted: nothing, in most methods.

        `alone` says that it is the only one of its optimizer step, so that what it holds lives no longer than that.
        """
        return batch

    def read_student(self, hidden: Float[Tensor, "batch position width"], head: LMHead, view: View) -> Supervised:
        """What `item_losses` learns of the student; runs inside its forward."""
        supervised = view.supervised
        states, labels = hidden[:, :-1][supervised], view.labels[:, 1:][supervised]
        if view.rollout is None:
            return Supervised(states, head, labels)
        begins = supervised.clone()
        begins[:, 1:] &= ~supervised[:, :-1]
        answers = begins.flatten().cumsum(0)[supervised.flatten()] - 1
        rollout = view.rollout.map(lambda tensor: tensor[:, 1:][supervised])
        return Supervised(states, head, labels, rollout=rollout, answers=answers)

    def total(self, losses: ItemLosses, counts: Mapping[str, Tensor]) -> Tensor:
        """The sum of the kinds' means, each over its own count."""
        means = [total / counts[kind].clamp(min=1) for kind, total in losses.totals.items()]
        # Gradients are averaged over ranks, while the counts are already those of all ranks.
        return torch.stack(means).sum() * (self.accelerator.num_processes if self.model.training else 1)

    def count_items(self, batch: Batch) -> dict[str, Tensor]:
        """How many items of each kind a micro-batch of this rank has."""
        supervised = batch.student.supervised
        routed = {ROUTER: supervised.new_ones((), dtype=torch.long)} if self.aux_loss_enabled else {}
        counts = {"token": supervised.sum(), **routed}
        return {**counts, DATA_TOKEN: (supervised & ~batch.student.own).sum()} if self.parts_tokens else counts

    def counted(self, batch: Batch) -> dict[str, Tensor]:
        """As `count_items`, of a batch that is learnt from, and those of the reward."""
        if not self.args.learns_from_reward:
            return self.count_items(batch)
        return {**self.count_items(batch), REWARD: batch.student.own.sum()}

    def rewarded(self, read: ReadStudent, losses: ItemLosses) -> ItemLosses:
        """The losses of a micro-batch with that of the reward of its rollouts, where there is one to learn from."""
        args = self.args
        if not args.learns_from_reward or not self.model.training:
            return losses
        assert args.reward_weight is not None
        more = policy_gradient(read(None), args.reward_weight, args.reward_clip, args.chunk_size, args.precise_logits)
        return ItemLosses({**losses.totals, **more.totals}, {**losses.reports, **more.reports})

    def count_pairs(self, batch: Batch, count: Callable[[View, View], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What `count` (the student's view, a teacher's) counts by kind of item, for all teachers.

        Those that are mixed have kinds of their own, those that teach rows of their own the same ones.
        """
        counts: dict[str, Tensor] = {}
        for name, pair in pairs_of(self.teacher, batch).items():
            for items, number in count(*pair).items():
                kind = items if is_routed(self.teacher) else kind_of(items, name)
                counts[kind] = counts[kind] + number if kind in counts else number
        return counts

    def step_ended(self, means: dict[str, float]) -> None:
        """Called once per optimizer step with this step's mean over all ranks of the reports named in `step_means`.

        Without such names it is not called.
        """
