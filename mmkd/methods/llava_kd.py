"""LLaVA-KD: the teacher's answers, its visual tokens and how they relate to each other (2410.16236)."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from datasets import Dataset
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmkd.data.image_columns import counts_by_row
from mmkd.errors import UserError
from mmkd.losses.divergences import forward_kl
from mmkd.losses.fused import fused_loss
from mmkd.losses.visual_relations import common_tokens, logit_metric, pooled, relation_loss, relations
from mmkd.models.backbone import full_head
from mmkd.models.heads import LMHead
from mmkd.schema import NonNegativeFloat, Share
from mmkd.teachers.batch import ONLY, Batch, View
from mmkd.teachers.cached import CachedTeacher
from mmkd.teachers.several import parts_of
from mmkd.teachers.signals import DenseSignal, MixedSignal, TopKSignal
from mmkd.teachers.teacher import DenseTeacher, Teacher
from mmkd.training.base import DistillationTrainer
from mmkd.training.config import DistillationConfig
from mmkd.training.items import ItemLosses, Reports, Supervised, add_share, kind_of
from mmkd.training.method import Method
from mmkd.training.teacher_views import image_columns
from mmkd.training.teaching import StudentSide, Teaching

_ALONE = (
    "Visual tokens are compared image by image. Give the teacher as many images in teacher_view.images_column as the "
    "student has, or set beta: 0 and gamma: 0 to compare answers only."
)


@dataclass
class LLaVAKDConfig(DistillationConfig):
    """Settings of method llava_kd."""

    combinations: ClassVar[tuple[str, ...]] = ("weights", "gradmag")

    ce_weight: Share = field(
        default=0.0,
        metadata={"help": "Always 0. alpha, beta and gamma weigh the other terms; cross-entropy counts 1."},
    )
    alpha: NonNegativeFloat = field(
        default=1.0,
        metadata={
            "help": "Weight of the KL divergence from the teacher on the tokens of the answer; 1 as in the paper."
        },
    )
    beta: NonNegativeFloat = field(
        default=1.0,
        metadata={"help": "Weight of the KL divergence from the teacher on the visual tokens; 1 as in the paper."},
    )
    gamma: NonNegativeFloat = field(
        default=0.5,
        metadata={
            "help": "Weight of the distance between the relations of visual tokens. 0.5 as in the paper; the "
            "authors' code has 1."
        },
    )
    relation_on: str = field(
        default="logits",
        metadata={
            "help": "Features by which visual tokens are related. logits (default): as in the paper. hidden: the "
            "last hidden states, which costs less with a large vocabulary and needs no shared one.",
            "choices": ["logits", "hidden"],
        },
    )
    relation_normalized: bool = field(
        default=False,
        metadata={
            "help": "Centre the features of each token and scale them to length 1 before they are related. false "
            "(default) is the paper's raw product, in which tokens with a large norm dominate."
        },
    )
    visual_mismatch: str = field(
        default="error",
        metadata={
            "help": "What to do if student and teacher cut an image into different numbers of visual tokens. error "
            "(default): stop. pool: average the finer grid to the coarser one for the visual terms.",
            "choices": ["error", "pool"],
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ce_weight:
            raise UserError(
                f"ce_weight is {self.ce_weight}, but llava_kd adds its terms to a cross-entropy of weight 1; set "
                "alpha, beta and gamma instead.",
                because="meaning",
            )
        if not self.alpha + self.beta + self.gamma:
            raise UserError(
                "alpha, beta and gamma are 0, which leaves nothing of the teacher; use method sft.", because="meaning"
            )

    @property
    def compares_images(self) -> bool:
        """Whether visual tokens are compared, and not only answers."""
        return self.beta > 0 or self.gamma > 0

    @property
    def term_weights(self) -> dict[str, float]:
        """The weight of each term of the loss, by the term's name in the logs."""
        return {"ce": 1.0, "divergence": self.alpha, "visual_kl": self.beta, "relation_distance": self.gamma}


@dataclass(frozen=True)
class VisualSupervised(Supervised):
    """The student at the answer's positions, and at the visual tokens themselves (unshifted, as the authors do)."""

    visual: Float[Tensor, "visual width"]
    images: Int[Tensor, "image"]
    """Visual tokens of each image."""


@dataclass(frozen=True)
class VisualSignal:
    """What the teacher says about the answer, and at its own visual tokens."""

    answer: DenseSignal | TopKSignal
    visual: DenseSignal | TopKSignal
    images: Int[Tensor, "image"]
    teacher: str = ONLY
    """Its name among several."""


class LLaVAKDTrainer(DistillationTrainer[VisualSignal | MixedSignal[VisualSignal]]):
    """Minimises `cross-entropy + alpha KL(answer) + beta KL(visual tokens) + gamma (1 - cos of their relations)`.

    The terms are means over tokens, visual tokens and images of the whole accumulated batch on all ranks. Rows without
    images have the first two only. Several teachers that are mixed have each visual terms of their own, with their
    weights, over as many visual tokens as each can be compared on.
    """

    method = "llava_kd"
    takes_several = True
    reports_by_teacher = ("kl", "visual_kl", "relation_distance")
    config_class = LLaVAKDConfig
    accepts = (DenseSignal, TopKSignal)
    reads_visual_tokens = True
    args: LLaVAKDConfig
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
        if top_k and cached and args.beta:
            raise UserError(
                "beta compares visual tokens, and a cache of log-probs holds those of answers only. Set beta: 0, or "
                "use a teacher_server or the teacher itself.",
                because="meaning",
            )

    def build_teacher(self, student: StudentSide, teacher: Any, processing_class: Any) -> Teaching:
        """The base's. Raises UserError too where visual tokens were not seen, or cannot be related by their logits."""
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
            common = self._common(student.images[:, 1], teacher.images[:, 1])
            numbers = {"visual_token": sum(common), "image": len(common)}
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
        return VisualSignal(answer, seen, view.images[:, 1], name)

    def read_student(self, hidden: Float[Tensor, "batch position width"], head: LMHead, view: View) -> Supervised:
        """The student at the same positions of its own sequence."""
        supervised = super().read_student(hidden, head, view)
        seen = hidden[:, :-1][view.visual[:, :-1]]
        return VisualSupervised(supervised.hidden, supervised.head, supervised.labels, seen, view.images[:, 1])

    def item_losses(self, student: Supervised, signal: VisualSignal | MixedSignal[VisualSignal]) -> ItemLosses:
        """The weighted terms of one micro-batch, each with its own kind of item."""
        assert isinstance(student, VisualSupervised)
        args, mixed = self.args, MixedSignal.of(signal)
        answers = mixed.map(lambda said: said.answer)
        terms: dict[str, dict[str, Tensor]] = {"visual_kl": {}, "relation_distance": {}}
        reports: Reports = {}
        for name, said in mixed.signals.items():
            common, weight = self._common(student.images, said.images), mixed.weights[name]
            ours = pooled(student.visual, student.images.tolist(), common)
            theirs = self._pooled(said, common)
            visual = self._visual_kl(ours, student.head, theirs)
            relation = self._relation(ours, student.head, theirs, common, said.teacher)
            terms["visual_kl"][kind_of("visual_token", name)] = weight * visual
            terms["relation_distance"][kind_of("image", name)] = weight * relation
            add_share(reports, "visual_kl", (visual, sum(common)), weight, name)
            add_share(reports, "relation_distance", (relation, len(common)), weight, name)
        if self.balances:
            both, of_answers = self.apart(student, answers)
            losses = ItemLosses(self.balanced({**both, **terms}, args.term_weights), of_answers)
        else:
            # CE + alpha KL as a mixture, which the fused loss computes in one pass.
            losses = self.fused(student, answers, ce_weight=1 / (1 + args.alpha))
            losses.totals["token"] = (1 + args.alpha) * losses.totals["token"]
            for name, weight in (("visual_kl", args.beta), ("relation_distance", args.gamma)):
                losses.totals |= {kind: weight * total for kind, total in terms[name].items()}
        losses.reports |= reports
        return losses

    def _pooled(self, said: VisualSignal, common: list[int]) -> DenseSignal | TopKSignal:
        """What the teacher says at so many visual tokens of each image. Raises UserError where it cannot be pooled."""
        seen = said.visual
        if isinstance(seen, DenseSignal):
            return DenseSignal(pooled(seen.hidden, said.images.tolist(), common), seen.head)
        if self.args.beta and said.images.tolist() != common:
            raise UserError(
                "visual_mismatch: pool averages the teacher's hidden states, and this teacher tells top-k log-probs "
                "only. Set beta: 0, or use a server of hidden states (teacher_server_signal: hidden).",
                because="meaning",
            )
        return seen

    def _visual_kl(self, hidden: Tensor, head: LMHead, theirs: DenseSignal | TopKSignal) -> Tensor:
        args = self.args
        if not args.beta:
            return hidden.float().sum() * 0
        labels = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        settings = {"chunk_size": args.chunk_size, "precise": args.precise_logits, "repeatable": self.balances}
        return fused_loss(hidden, head, labels, theirs, forward_kl, **settings).total

    def _relation(
        self, hidden: Tensor, head: LMHead, theirs: DenseSignal | TopKSignal, common: list[int], teacher: str
    ) -> Tensor:
        args = self.args
        if not args.gamma:
            return hidden.float().sum() * 0
        assert isinstance(theirs, DenseSignal)
        normalized = args.relation_normalized
        if args.relation_on == "hidden":
            target = relations(theirs.hidden, common, normalized=normalized)
            return relation_loss(hidden, common, target, normalized=normalized, repeatable=self.balances)
        if teacher not in self._metrics:
            frozen = theirs.head.frozen()
            metric = logit_metric(frozen.weight, frozen.bias, centered=normalized)
            self._metrics = {**self._metrics, teacher: metric}
        target = relations(theirs.hidden, common, self._metrics[teacher], normalized=normalized)
        weight, bias = head.weight[: head.vocab_size], None if head.bias is None else head.bias[: head.vocab_size]
        own = {"weight": weight, "bias": bias, "normalized": normalized}
        return relation_loss(hidden, common, target, repeatable=self.balances, **own)

    def _common(self, student: Int[Tensor, "image"], teacher: Int[Tensor, "image"]) -> list[int]:
        """Visual tokens to compare of each image. Raises UserError where the two sides differ and must not."""
        ours, theirs = student.tolist(), teacher.tolist()
        if ours != theirs and not self.args.compares_images:
            return []
        if ours != theirs and self.args.visual_mismatch == "error":
            raise UserError(
                f"Student and teacher cut images into different numbers of visual tokens ({ours[:4]} and "
                f"{theirs[:4]}), which cannot be compared one by one. Set visual_mismatch: pool to average them to a "
                "common grid, or beta: 0 and gamma: 0 to compare answers only.",
                because="meaning",
            )
        return [common_tokens(*pair) for pair in zip(ours, theirs, strict=True)]


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
