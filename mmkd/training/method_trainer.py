"""What a method adds to a trainer, and the losses that methods share."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.trainer_callback import TrainerCallback

from mmkd.errors import UserError
from mmkd.losses.divergences import forward_kl
from mmkd.losses.fused import MixedTargets, Objective, Targets, fused_loss
from mmkd.models.heads import LMHead
from mmkd.models.last_block import LastBlock
from mmkd.models.load import tokenizer_of
from mmkd.preparation.labelling import Labelling
from mmkd.teachers.batch import ONLY, Batch, View
from mmkd.teachers.several import asked, is_routed, pairs_of, parts_of
from mmkd.teachers.signals import DenseSignal, MixedSignal, RoutedSignal, TopKSignal
from mmkd.teachers.teacher import Teacher

from .answers import Placed
from .balance import balance_factors, gradients_in_last_layer
from .config import DistillationConfig
from .items import ItemLosses, ReadStudent, Supervised, Terms, kind_of
from .rewards import REWARD, policy_gradient
from .rollout_trainer import RolloutTrainer
from .self_teaching import SelfTaughtTrainer
from .served_rollouts import as_served
from .teaching import StudentSide, Teaching, teaching_of
from .token_weights import importance_weights

ROUTER = "router"
"""The kind of item of which a micro-batch has one: the load-balancing loss of a mixture of experts."""

Signal = TypeVar("Signal")
"""What a method reads of its teacher."""


class MethodTrainer(SelfTaughtTrainer, RolloutTrainer, Generic[Signal]):
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
    _counts: dict[str, Tensor]
    """Kind of item -> how many the accumulated batch has on all ranks."""
    _last_block: LastBlock | None = None
    """Where losses are balanced and the student is sharded."""

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
        return {"token": supervised.sum(), **routed}

    def counted(self, batch: Batch) -> dict[str, Tensor]:
        """As `count_items`, of a batch that is learnt from, and those of the reward."""
        if not self.args.learns_from_reward:
            return self.count_items(batch)
        view = batch.student
        own = view.supervised if view.rollout is None else view.rollout.own[:, 1:] & view.supervised
        return {**self.count_items(batch), REWARD: own.sum() if view.rollout is not None else torch.tensor(0)}

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

    # What methods share

    @property
    def balances(self) -> bool:
        """Whether the terms of this pass are to be balanced."""
        return self.args.combine == "gradmag" and self.model.training

    def fused(
        self,
        student: Supervised,
        signal: Targets | MixedTargets | None,
        objective: Objective = forward_kl,
        temperature: float = 1.0,
        ce_weight: float | None = None,
        weights: Float[Tensor, "token"] | None = None,
    ) -> ItemLosses:
        """The item losses of a token-level divergence and cross-entropy, mixed or balanced, with all reports.

        `weights` are those of the tokens, by default `token_weights`, which the signal must be as the teacher gave it
        for. Their sum is divided by the number of tokens, whatever the weights.
        """
        weights = self.token_weights(student, signal) if weights is None else weights
        if not self.balances:
            weight = self.args.ce_weight if ce_weight is None else ce_weight
            return self._mixed(student, signal, objective, temperature, weight, weights)
        terms, reports = self.apart(student, signal, objective, temperature, weights)
        return ItemLosses(self.balanced(terms, self.args.term_weights), reports)

    def token_weights(self, student: Supervised, signal: Any) -> Float[Tensor, "token"] | None:
        """What `rollout_token_weights` says of each token; None where all count alike."""
        if self.args.rollout_token_weights != "importance" or student.rollout is None:
            return None
        return importance_weights(student, signal, self.args.importance_gamma, self.args.chunk_size)

    def apart(
        self,
        student: Supervised,
        signal: Targets | MixedTargets | None,
        objective: Objective = forward_kl,
        temperature: float = 1.0,
        weights: Float[Tensor, "token"] | None = None,
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Divergence and cross-entropy, each by a pass of its own through the head, and the reports of both."""
        weights = self.token_weights(student, signal) if weights is None else weights
        divergence = self._mixed(student, signal, objective, temperature, 0.0, weights)
        ce = self._mixed(student, None, forward_kl, 1.0, 1.0, weights)
        return {"divergence": divergence.totals, "ce": ce.totals}, ce.reports | divergence.reports

    def balanced(self, terms: Terms, weights: Mapping[str, float] | None = None) -> dict[str, Tensor]:
        """What the terms add up to per kind of item when they are balanced.

        Terms of weight 0 are left out; without weights all have the same. Logs each factor as `balance/<term>`.
        """
        counted = {name: term for name, term in terms.items() if weights is None or weights[name]}
        means = {
            name: torch.stack([total / self._counts[kind].clamp(min=1) for kind, total in term.items()]).sum()
            for name, term in counted.items()
        }
        factors = balance_factors(means, weights, self.gradients_in, self._summed)
        # A term without gradient, of a teacher without rows say, has no factor to speak of.
        self._record({f"balance/{name}": (factor, factor > 0) for name, factor in factors.items()})
        return ItemLosses.added(
            {kind: total * factors[name] for kind, total in term.items()} for name, term in counted.items()
        )

    def gradients_in(self, means: Mapping[str, Tensor]) -> Float[Tensor, "loss parameter"]:
        """A row for each term: the gradient of its mean in the last layer, or as long where it belongs elsewhere."""
        own = gradients_in_last_layer(self.model) if self._last_block is None else self._last_block.gradients_of
        return own(list(means.values()))

    def _mixed(
        self,
        student: Supervised,
        signal: Targets | MixedTargets | None,
        objective: Objective,
        temperature: float,
        ce_weight: float,
        weights: Tensor | None,
    ) -> ItemLosses:
        args = self.args
        loss = fused_loss(
            student.hidden,
            student.head,
            student.labels,
            signal,
            objective,
            temperature=temperature,
            ce_weight=ce_weight,
            chunk_size=args.chunk_size,
            precise=args.precise_logits,
            diagnostics=self._reports_now(),
            repeatable=args.combine == "gradmag",
            weights=weights,
        )
        sums = loss.sums
        if self.logs_apart and "divergence" in sums:
            # Of the tokens that "kl" is about; "divergence" itself is of all steps since the last log.
            sums = {**sums, "step_divergence": sums["divergence"]}
        tokens = len(student.labels)
        return ItemLosses({"token": loss.total}, {name: (total, tokens) for name, total in sums.items()})
