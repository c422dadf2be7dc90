"""LLaVA-KD: the teacher's answers, its visual tokens and how they relate to each other (2410.16236)."""

from collections.abc import Callable
from functools import cached_property
from itertools import islice
from typing import Any, ClassVar

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmkd.data.image_columns import counts_by_row
from mmkd.errors import UserError
from mmkd.losses.divergences import Divergence, forward_kl
from mmkd.models.backbone import full_head
from mmkd.models.heads import LMHead
from mmkd.models.sharded_weights import is_sharded
from mmkd.models.visual_switch import VisualOutputs, visual_outputs_of
from mmkd.seams.transformers_seam import checkpoint_frozen_layers
from mmkd.teachers.batch import Batch, View
from mmkd.teachers.cached import CachedTeacher
from mmkd.teachers.local import LocalTeacher
from mmkd.teachers.several import parts_of
from mmkd.teachers.signals import DenseSignal, MixedSignal, TopKSignal
from mmkd.teachers.teacher import DenseTeacher, Teacher
from mmkd.training.feature_trainer import FeatureTrainer
from mmkd.training.items import ItemLosses, ReadStudent, Reports, Supervised, add_share, kind_of
from mmkd.training.logit_difference import DIFFERENCES, check_temperature, listed_tokens
from mmkd.training.method import Method
from mmkd.training.teacher_views import image_columns
from mmkd.training.teaching import StudentSide, Teaching

from .llava_kd_config import LLaVAKDConfig as LLaVAKDConfig
from .llava_kd_switch import (
    SWITCH,
    SWITCHED,
    check_switched_student,
    check_switching_teacher,
    in_rows_with_images,
    switch_loss,
)
from .llava_kd_visual import VisualSignal as VisualSignal
from .llava_kd_visual import VisualSupervised as VisualSupervised
from .llava_kd_visual import VisualTerms

_ALONE = (
    "Visual tokens are compared image by image. Give the teacher as many images in teacher_view.images_column as the "
    "student has, or set beta: 0 and gamma: 0 to compare answers only."
)


_TRIED_ROWS = 8


class LLaVAKDTrainer(FeatureTrainer[VisualSignal | MixedSignal[VisualSignal]]):
    """Minimises `cross-entropy + alpha KL(answer) + beta KL(visual tokens) + gamma (1 - cos of their relations)`.

    Another `divergence` can take the place of the KL on the answer, and EM-KD's terms can be added. The terms are
    means over tokens, visual tokens and images of the whole accumulated batch on all ranks. Rows without images have
    the first two only. Several teachers that are mixed have each visual terms of their own, with their weights, over
    as many visual tokens as each can be compared on.
    """

    method = "llava_kd"
    takes_several = True
    reports_by_teacher = ("kl", "visual_kl", "relation_distance", "visual_mse", "alignment_distance", SWITCH)
    config_class = LLaVAKDConfig
    accepts = (DenseSignal, TopKSignal)
    reads_visual_tokens = True
    args: LLaVAKDConfig
    _visual_outputs: VisualOutputs
    """Those of the student in the forward pass that is under way, for the switch."""
    _paper: ClassVar[dict[str, str]] = {
        "title": "LLaVA-KD: A Framework of Distilling Multimodal Large Language Models",
        "id": "2410.16236",
    }

    @classmethod
    def check_teacher(cls, teacher: Teacher, args: Any) -> None:
        """Raises UserError too where a cache, or top-k log-probs, do not tell enough for the terms that count."""
        super().check_teacher(teacher, args)
        cached, top_k = isinstance(teacher, CachedTeacher), issubclass(teacher.signal_type, TopKSignal)
        if top_k and args.gamma:
            raise UserError(
                "gamma relates visual tokens by the teacher's hidden states, and this teacher tells top-k log-probs "
                "only. Set gamma: 0, or use a server of hidden states (teacher_server_signal: hidden) or the teacher "
                "itself.",
                because="meaning",
            )
        for key in ("vsd_weight", "vlad_weight"):
            if top_k and getattr(args, key):
                raise UserError(
                    f"{key} compares logits and hidden states, and this teacher tells top-k log-probs only. Set "
                    f"{key}: 0, or use a server of hidden states (teacher_server_signal: hidden) or the teacher "
                    "itself.",
                    because="meaning",
                )
        check_temperature(teacher, args)
        if args.switching is not None:
            check_switching_teacher(teacher)
        if top_k and cached and args.beta:
            raise UserError(
                "beta compares visual tokens, and a cache of log-probs holds those of answers only. Set beta: 0, or "
                "use a teacher_server or the teacher itself.",
                because="meaning",
            )

    def build_teacher(self, student: StudentSide, teacher: Any, processing_class: Any) -> Teaching:
        """The base's. Raises UserError too where visual tokens were not seen, or cannot be related by their logits."""
        if self.args.switching is not None:
            check_switched_student(self.model)
        teaching = super().build_teacher(student, teacher, processing_class)
        if self.args.compares_images and student.labelling.vision:
            for column in image_columns(teacher, self.args):
                for split, rows in student.splits.items():
                    _check_as_many_images(rows, split, column)
        for part in parts_of(teaching.teacher) if student.labelling.vision else ():
            if isinstance(part, CachedTeacher) and part.states is not None and not part.sees:
                raise UserError(
                    f"llava_kd compares visual tokens, and the cache {part.cache.folder} was built for a method that "
                    "does not: it has the teacher's hidden states at the answers only. Build it again with this "
                    "recipe in another folder.",
                    because="meaning",
                )
        if self.args.gamma and self.args.relation_on == "logits":
            parts = parts_of(teaching.teacher)
            caps = [part.softcap for part in parts if isinstance(part, DenseTeacher | CachedTeacher)]
            if any(cap is not None for cap in (full_head(self.model).softcap, *caps)):
                raise UserError(
                    "The logits of the student or the teacher are softcapped (Gemma 2), so their products do not "
                    "follow from the head alone. Set relation_on: hidden.",
                    because="not built",
                )
        return teaching

    def count_items(self, batch: Batch) -> dict[str, Tensor]:
        """Tokens, visual tokens that are compared, and images, each kind with its own mean."""

        def count(student: View, teacher: View) -> dict[str, Tensor]:
            if self.args.compares_images and not torch.equal(student.images[:, 0], teacher.images[:, 0]):
                raise UserError(
                    f"A row has another number of images for the teacher than for the student. {_ALONE}",
                    because="meaning",
                )
            common = self._visual_terms.counts(student.images[:, 1], teacher.images[:, 1])
            numbers = {"visual_token": sum(common), "image": len(common)}
            if self.args.switching is not None:
                numbers[SWITCHED] = int(in_rows_with_images(student).sum())
            return {kind: torch.tensor(number, device=student.labels.device) for kind, number in numbers.items()}

        return {**super().count_items(batch), **self.count_pairs(batch, count)}

    def ask_teacher(self, teacher: Teacher[DenseSignal | TopKSignal], name: str, view: View) -> VisualSignal:
        """One pass of a teacher, read at the answer and at its visual tokens."""
        visual = view.visual[:, :-1]
        if issubclass(teacher.signal_type, TopKSignal) and not self.args.beta:
            # A cache of log-probs knows answers only, and a server need not send others.
            visual = torch.zeros_like(visual)
        signal = teacher.ask(view, looked_at := view.supervised | visual)
        answer, seen = (_only(signal, mask[looked_at]) for mask in (view.supervised, visual))
        asked = (teacher, view) if isinstance(teacher, LocalTeacher) and self.args.switching is not None else None
        return VisualSignal(answer, seen, view.images[:, 1], name, asked, self._runs_of(view))

    def _runs_of(self, view: View) -> Int[Tensor, "run"] | None:
        return view.image_runs if self.args.visual_tokens == "pool" else None

    def answer_states(self, said: Any) -> Float[Tensor, "token width"]:
        """Those of the answer alone."""
        return super().answer_states(said.answer)

    def read_student(self, hidden: Float[Tensor, "batch position width"], head: LMHead, view: View) -> Supervised:
        """The student at the same positions of its own sequence."""
        supervised = super().read_student(hidden, head, view)
        seen, images = hidden[:, :-1][view.visual[:, :-1]], view.images
        token_rows = view.supervised.nonzero()[:, 0]
        answer = (supervised.hidden, supervised.head, supervised.labels)
        return VisualSupervised(
            *answer,
            seen,
            images[:, 1],
            image_rows=images[:, 0],
            token_rows=token_rows,
            runs=self._runs_of(view),
            rollout=supervised.rollout,
            answers=supervised.answers,
        )

    def item_losses(self, student: Supervised, signal: VisualSignal | MixedSignal[VisualSignal]) -> ItemLosses:
        """The weighted terms of one micro-batch, each with its own kind of item."""
        assert isinstance(student, VisualSupervised)
        args, mixed = self.args, MixedSignal.of(signal)
        answers: Any = mixed.map(lambda said: said.answer)
        objective: Divergence = forward_kl
        if args.divergence in DIFFERENCES:
            objective, answers = DIFFERENCES[args.divergence](args), listed_tokens(answers)
        terms: dict[str, dict[str, Tensor]] = {}
        reports: Reports = {}
        for name, said in mixed.signals.items():
            weight = mixed.weights[name]
            for term, (items, total, count) in self._visual_terms.of(student, said, self.balances).items():
                terms.setdefault(term, {})[kind_of(items, name)] = weight * total
                add_share(reports, term, (total, count), weight, name)
            if args.switching is not None:
                total, count = self._switched(student, said)
                terms.setdefault(SWITCH, {})[kind_of(SWITCHED, name)] = weight * total
                add_share(reports, SWITCH, (total, count), weight, name)
        if self.balances:
            both, of_answers = self.apart(student, answers, objective, args.temperature)
            losses = ItemLosses(self.combined({**both, **terms}), of_answers)
        else:
            losses = self.fused(student, answers, objective, args.temperature)
            losses.totals = ItemLosses.added([losses.totals, self.combined(terms)])
        losses.reports |= reports
        return losses

    def forward(self, model: Any, batch: Batch, losses_of: Callable[[ReadStudent], ItemLosses]) -> ItemLosses:
        """The base's; for the switch, the student's visual output is taken on the way."""
        if self.args.switching is None:
            return super().forward(model, batch, losses_of)
        with visual_outputs_of(self.model) as self._visual_outputs:
            return super().forward(model, batch, losses_of)

    def _switched(self, student: VisualSupervised, said: VisualSignal) -> tuple[Tensor, int]:
        """The switch term of one teacher and the number of its items; 0 where the student sees no picture."""
        assert self.args.switching is not None
        assert said.asked is not None
        assert isinstance(said.answer, DenseSignal)
        if not any(self._visual_outputs):
            return student.hidden.float().sum() * 0, 0
        total = switch_loss(self.args, self.args.switching, *said.asked, said.answer, self._visual_outputs)
        return total, int(in_rows_with_images(said.asked[1]).sum())

    def _fit(self, teacher: Any, teacher_processing_class: Any) -> None:
        """The base's. Raises UserError too where the student's visual output does not fit the teacher's connector."""
        super()._fit(teacher, teacher_processing_class)
        if self.args.switching is None:
            return
        for part in parts_of(self.teacher):
            if self.args.activation_checkpointing:
                checkpoint_frozen_layers(part.model)
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise UserError(
                "switch needs a gradient through the frozen teacher, which DeepSpeed's engine does not give. Use "
                "accelerate_config ddp or fsdp2, or remove switch.",
                because="not built",
            )
        if not is_sharded(self.accelerator):
            self._try_switch()

    @torch.no_grad()
    def _try_switch(self) -> None:
        """Sends the first picture of the train data through both models, so that what does not fit is known early."""
        training = self.model.training
        for row in islice(self.train_dataset, _TRIED_ROWS):
            batch = self.on_device(self.data_collator([dict(row)]))
            if len(batch.student.images):
                signal, self._visual_outputs = self.ask(batch), []
                self.model.eval()
                self.forward(self.model, batch, lambda read, signal=signal: self.losses_of(read, signal))
                break
        self.model.train(training)

    @cached_property
    def _visual_terms(self) -> VisualTerms:
        return VisualTerms(self.args)


def _check_as_many_images(rows: Any, split: str, column: str) -> None:
    """Raises UserError for a row with more or fewer images in a teacher's column; of a stream, batches are checked."""
    if not isinstance(rows, Dataset):
        return
    counts = [counts_by_row(rows, name) for name in ("images", column)]
    for row, (ours, theirs) in enumerate(zip(*counts, strict=True)):
        if ours != theirs:
            raise UserError(
                f"Row {row} of the {split} data (from 0, after filters and shuffle) has {ours} images for the student "
                f"and {theirs} for the teacher. {_ALONE}",
                because="meaning",
            )


def _only(signal: DenseSignal | TopKSignal, chosen: Bool[Tensor, "token"]) -> DenseSignal | TopKSignal:
    """What is said about some of the tokens."""
    if isinstance(signal, DenseSignal):
        return DenseSignal(signal.hidden[chosen], signal.head)
    return TopKSignal(signal.ids[chosen], signal.log_probs[chosen], signal.tail_log_probs[chosen])


METHOD = Method(
    LLaVAKDTrainer,
    unused={"ce_weight": "Always 0: alpha, beta and gamma weigh the other terms."},
)
