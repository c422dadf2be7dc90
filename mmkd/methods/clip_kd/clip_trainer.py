"""ContrastiveKDTrainer: a dual encoder learns from pairs, and from what larger dual encoders say of them."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers.trainer_callback import TrainerCallback

from mmkd.errors import UserError
from mmkd.losses.contrastive_losses import Targets
from mmkd.models.dual_encoder import DualEncoder
from mmkd.models.pair_heads import add_pair_heads, let_pairs_be_read, pair_head, pair_heads
from mmkd.models.sharded_weights import called
from mmkd.models.whole_student import WholeStudent, add_adapter
from mmkd.preparation.checks import check_precision
from mmkd.preparation.pair_batches import (
    CAPTIONS,
    ROWS,
    STUDENT,
    TEXTS,
    PairCollator,
    PairRows,
)
from mmkd.seams.deepspeed_seam import set_number
from mmkd.teachers.pair_scorers import PairScorer
from mmkd.training.gathering import gathered
from mmkd.training.gradient_cache import PartGradients, RandomState, buffers_kept, shares, surrogate

from .clip_config import ContrastiveKDConfig as ContrastiveKDConfig
from .learnt_masks import LearntMasks
from .pair_evaluation import EvaluatedPairs
from .pair_inputs import cached_pairs, check_encoders, pair_rows
from .pair_terms import (
    PairFacts,
    PairFeatures,
    PairView,
    StudentSays,
    TeacherSays,
    own_term,
    retrieved,
    same_captions,
    taught_terms,
)
from .pair_trainer import PairTrainer, Reports
from .ranking_terms import ranked_terms
from .scored_pairs import ScoredPairs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TeacherEncoder:
    """A teacher: a dual encoder and its share of the loss."""

    encoder: DualEncoder
    weight: float = 1.0


class ScaleLimit(TrainerCallback):
    """Keeps the student's scale in bounds."""

    def __init__(self, trainer: "ContrastiveKDTrainer"):
        self.trainer = trainer

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        student, most = self.trainer.student, self.trainer.args.max_logit_scale
        if self.trainer.is_deepspeed_enabled and student.loss_parameters:
            set_number(student.loss_parameters[0], lambda scale: scale.clamp(max=math.log(most)))
        else:
            student.limit_scale(most)


class ContrastiveKDTrainer(PairTrainer):
    """transformers' Trainer for a dual encoder, whose losses are over the pairs of all ranks and accumulated parts.

    Args:
        model: the student, a `DualEncoder` (`load_dual_encoder`).
        teachers: a `DualEncoder` or `TeacherEncoder`, or several by name. None: pairs alone teach.
        args: settings of the method, by default the config's own with the output_dir "clip_kd".
        train_dataset: rows with a picture and its captions, or with two texts; or `PairRows`.
        eval_dataset: rows to measure on, in the same form.
        pair_scorer: the model whose order `ranking` learns, by default `ranking_teacher` in args.
        peft_config: an adapter to train in the place of the student's weights; it is merged into what is saved.
        callbacks: callbacks of transformers' Trainer.
        optimizers: an optimizer and a schedule in place of those that args ask for.
        optimizer_cls_and_kwargs: the class of an optimizer and its arguments, in place of `optim` in args.

    Raises UserError when student, teachers, data and settings cannot work together, before any step is taken.
    """

    method = "clip_kd"
    config_class: ClassVar[type[ContrastiveKDConfig]] = ContrastiveKDConfig
    needs_teacher: ClassVar[bool] = False
    takes_several: ClassVar[bool] = True
    accepts: ClassVar[tuple[type, ...]] = ()
    one_vocabulary: ClassVar[bool] = False
    # `compute_loss` divides by the pairs of the whole accumulated batch, so the Trainer must not divide again.
    loss_is_scaled_for_ga = True

    args: ContrastiveKDConfig
    model: Any
    train_dataset: Any

    def __init__(
        self,
        model: DualEncoder,
        teachers: DualEncoder | TeacherEncoder | Mapping[str, DualEncoder | TeacherEncoder] | None = None,
        args: ContrastiveKDConfig | None = None,
        train_dataset: Dataset | PairRows | None = None,
        eval_dataset: Dataset | PairRows | None = None,
        *,
        pair_scorer: PairScorer | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
    ):
        args = self.config_class("clip_kd") if args is None else args
        if not isinstance(args, self.config_class):
            raise UserError(f"{type(self).__name__} takes a ContrastiveKDConfig, not a {type(args).__name__}.")
        check_precision(args, args.emulated_bf16)
        named = _named(teachers)
        whole = sum(teacher.weight for teacher in named.values())
        self.shares = {name: teacher.weight / whole for name, teacher in named.items()}
        self.teachers = {name: teacher.encoder for name, teacher in named.items()}
        self.weights = args.weights_with(bool(named))
        cached = cached_pairs(self.teachers, args)
        rows = pair_rows(train_dataset, args, "train", cached)
        held_out = None if eval_dataset is None else pair_rows(eval_dataset, args, "eval", cached)
        check_encoders(model, self.teachers, rows, args)
        for teacher in self.teachers.values():
            teacher.model.to(args.device).eval().requires_grad_(False)
        self.student = model
        self.scored = ScoredPairs.of(pair_scorer, rows, args)
        self._prepare_student(args, peft_config)
        self.masks = LearntMasks.of(model, args)
        self.collate = PairCollator(model, self.teachers)
        self._parts: list[dict[str, Any]] = []
        self._shares: list[PartGradients] = []
        self._evaluated = EvaluatedPairs()
        super().__init__(
            model=model.model,
            args=args,
            data_collator=self.collate,
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=getattr(model, "processor", None),
            callbacks=[ScaleLimit(self), *filter(None, [self.masks]), *(callbacks or [])],
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )

    def _prepare_student(self, args: ContrastiveKDConfig, peft_config: PeftConfig | None) -> None:
        """Adapter, heads, scale, and what is not trained."""
        student = self.student
        adapted = None if peft_config is None else add_adapter(student, peft_config)
        self.whole = WholeStudent(student, adapted)
        contrasts = self.weights["hard_negatives"] and args.hard_contrast_weight
        wants_heads = self.weights["feature_mse"] or self.weights["icl"] or contrasts
        add_pair_heads(student, {name: own.width for name, own in self.teachers.items() if wants_heads})
        let_pairs_be_read(student)
        if args.logit_scale is not None:
            student.start_scale(args.logit_scale)
        for parameter in student.loss_parameters:
            parameter.requires_grad_(args.train_logit_scale)
        if args.freeze != "none":
            for name, parameter in student.model.named_parameters():
                if student.side_of(name) == args.freeze:
                    parameter.requires_grad_(False)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Collects the parts of one contrastive batch."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._parts, self._shares = list(batches), []
        return batches, num_items

    # The step

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The part's share of the loss of the accumulated batch of all ranks."""
        self._keep_frozen()
        if len(self._parts) > 1:
            loss = self._part_loss(model, inputs)
        else:
            asked, facts = self.ask(inputs), _facts(inputs)
            loss, reports = model(reader=lambda: self.losses(self.encode(self.student, inputs[STUDENT]), asked, facts))
            self._record(reports)
        if self.masks is not None:
            loss = loss + self.masks.penalty() / max(1, len(self._parts))
            self._record({"kept_share": (self.masks.kept_share(), 1)})
        return (loss, {}) if return_outputs else loss

    def _part_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if not self._shares:
            self._shares = self._shares_of_parts()
        given = self._shares.pop(0)

        def reader() -> Tensor:
            features = self.encode(self.student, inputs[STUDENT])
            return surrogate((features.images, features.texts), self._loss_parameters(), given)

        with given.state.again():
            return model(reader=reader)

    def _shares_of_parts(self) -> list[PartGradients]:
        """What the loss of all parts says of each: they are embedded without a graph, which takes no memory."""
        device = self.args.device
        parts = [self.on_device(part) for part in self._parts]
        states, embedded = [], []
        with buffers_kept(self.model):
            for part in parts:
                states.append(RandomState.now(device))
                with torch.no_grad(), called(self.model, self.accelerator) as model:
                    embedded.append(model(reader=lambda part=part: self.encode(self.student, part[STUDENT])))
        joined = PairFeatures.joined(embedded)
        features = [tensor.detach().requires_grad_() for tensor in (joined.images, joined.texts)]
        answers = [self.ask(part) for part in parts]
        asked = {name: PairFeatures.joined([answer[name] for answer in answers]) for name in self.teachers}
        facts = PairFacts.joined([_facts(part) for part in parts])

        def reader() -> list[PartGradients]:
            loss, reports = self.losses(PairFeatures(*features), asked, facts)
            self._record(reports)
            sizes = [len(part[CAPTIONS]) for part in parts]
            # In here, where weights that are cut over ranks are whole.
            return shares(loss, features, self._loss_parameters(), sizes, states)

        with called(self.model, self.accelerator) as model:
            return model(reader=reader)

    def _loss_parameters(self) -> list[Tensor]:
        own = [*self.student.loss_parameters, *pair_heads(self.student).parameters()]
        return [parameter for parameter in own if parameter.requires_grad]

    def _keep_frozen(self) -> None:
        """A tower that is not trained drops nothing out."""
        if self.args.freeze != "none":
            for name, module in self.student.model.named_modules():
                if self.student.side_of(name) == self.args.freeze:
                    module.training = False

    def losses(
        self,
        features: PairFeatures,
        asked: Mapping[str, PairFeatures],
        facts: PairFacts,
        everywhere: bool = True,
    ) -> tuple[Tensor, Reports]:
        """This rank's share of the loss of all pairs `everywhere`, and reports; else that of its pairs by themselves.

        The gradient by features is that of all ranks' loss. Gradients are averaged over ranks, so that the share is
        multiplied by their number.
        """
        student, view = self.student, PairView.of(features, everywhere)
        numbers = gathered(facts.numbers) if everywhere else facts.numbers
        targets = Targets.of(view.cosines, facts.numbers, numbers, self.args.same_caption)
        says = StudentSays(features, view, student.logit_scale, student.logit_bias, targets, student.sigmoid)
        views = {name: self._teacher_says(name, own, everywhere) for name, own in asked.items()}
        pairs = len(facts.numbers)
        total = features.images.new_zeros(pairs, dtype=torch.float32)
        reports: Reports = {
            "same_captions": (same_captions(facts, numbers), pairs),
            "in_batch_accuracy": retrieved(view),
            "logit_scale": (says.scale.detach() * pairs, pairs),
        }
        if self.weights["clip"]:
            own = own_term(says)
            total, reports["clip_loss"] = total + self.weights["clip"] * own, (own.detach().sum(), pairs)
        for name, teacher in views.items():
            terms = taught_terms(says, teacher, self.weights, self.args)
            terms |= ranked_terms(says, teacher, facts.numbers[:, None] == numbers, self.args, everywhere)
            total = total + self.shares[name] * sum(self.weights[term] * value for term, value in terms.items())
            reports |= {_report(f"{term}_loss", name): (value.detach().sum(), pairs) for term, value in terms.items()}
        if self.scored is not None:
            known = self.scored if everywhere else self.scored.held_out(self.evaluated_rows)
            scored = known.term(says, facts, numbers, gathered(facts.rows) if everywhere else facts.rows)
            total = total + self.args.scored_weight * scored
            reports["ranking_loss"] = (scored.detach().sum(), pairs)
        return total.sum() / len(numbers) * (self.accelerator.num_processes if everywhere else 1), reports

    def _teacher_says(self, name: str, features: PairFeatures, everywhere: bool) -> TeacherSays:
        head = pair_head(self.student, name) if len(pair_heads(self.student)) else None
        return TeacherSays(PairView.of(features, everywhere), self.teachers[name].logit_scale, head)


def _named(teachers: Any) -> dict[str, TeacherEncoder]:
    """Teachers by name, the only one by none."""
    if teachers is None:
        return {}
    several = teachers if isinstance(teachers, Mapping) else {"": teachers}
    return {name: own if isinstance(own, TeacherEncoder) else TeacherEncoder(own) for name, own in several.items()}


def _facts(inputs: Mapping[str, Any]) -> PairFacts:
    return PairFacts(inputs[CAPTIONS], inputs[ROWS], inputs[TEXTS])


def _report(measure: str, teacher: str) -> str:
    return f"{measure}_{teacher}" if teacher else measure
