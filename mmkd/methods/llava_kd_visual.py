"""llava_kd's visual tokens: which of them are compared with which of the teacher's, and by which terms."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmkd.errors import UserError
from mmkd.losses.divergences import forward_kl
from mmkd.losses.fused import Objective, Targets, fused_loss
from mmkd.losses.token_matching import matched_by_image
from mmkd.losses.visual_alignment import alignment_distance, logit_distances, squared_difference
from mmkd.losses.visual_relations import common_tokens, logit_metric, pooled, relation_loss, relations, tiles_of
from mmkd.models.heads import LMHead
from mmkd.teachers.batch import ONLY, View
from mmkd.teachers.local import LocalTeacher
from mmkd.teachers.signals import DenseSignal, RawSignal, TopKSignal
from mmkd.training.items import Supervised

from .llava_kd_config import LLaVAKDConfig


@dataclass(frozen=True)
class VisualSupervised(Supervised):
    """The student at the answer's positions, and at the visual tokens themselves (unshifted, as the authors do)."""

    visual: Float[Tensor, "visual width"]
    images: Int[Tensor, "image"]
    """Visual tokens of each image."""
    image_rows: Int[Tensor, "image"] | None = None
    """The row of each image, and below that of each supervised token; None where nobody asks."""
    token_rows: Int[Tensor, "token"] | None = None
    runs: Int[Tensor, "run"] | None = None
    """`View.image_runs`; None where images are taken whole."""


@dataclass(frozen=True)
class VisualSignal:
    """What the teacher says about the answer, and at its own visual tokens."""

    answer: DenseSignal | TopKSignal
    visual: DenseSignal | TopKSignal
    images: Int[Tensor, "image"]
    teacher: str = ONLY
    """Its name among several."""
    asked: tuple[LocalTeacher, View] | None = None
    """The teacher itself and what it read, where the student's visual output goes through it."""
    runs: Int[Tensor, "run"] | None = None
    """`View.image_runs`; None where images are taken whole."""


@dataclass(frozen=True)
class ComparedTokens:
    """The visual tokens of student and teacher that are compared one by one, and how many each image has of them."""

    ours: Float[Tensor, "visual width"]
    head: LMHead
    theirs: DenseSignal | TopKSignal
    counts: list[int]


@dataclass
class VisualTerms:
    """The terms of llava_kd over visual tokens. Each is a sum over its items, with gradient."""

    args: LLaVAKDConfig
    metrics: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))
    """W^T W of each teacher's head, by its name."""

    def counts(self, student: Int[Tensor, "image"], teacher: Int[Tensor, "image"]) -> list[int]:
        """Visual tokens to compare of each image. Raises UserError where the two sides differ and must not."""
        ours, theirs = student.tolist(), teacher.tolist()
        if ours != theirs and not self.args.compares_images:
            return []
        if ours != theirs and self.args.visual_tokens == "same":
            raise UserError(
                f"Student and teacher cut images into different numbers of visual tokens ({ours[:4]} and "
                f"{theirs[:4]}), which cannot be compared one by one. Set visual_tokens: pool to average them to a "
                "common grid, visual_tokens: hungarian to match each with the one most like it, or beta: 0 and "
                "gamma: 0 to compare answers only.",
                because="meaning",
            )
        return [common_tokens(*pair) for pair in zip(ours, theirs, strict=True)]

    def compared(self, student: VisualSupervised, said: VisualSignal) -> ComparedTokens:
        """The visual tokens that go together. Raises UserError where the teacher does not tell enough for that."""
        counts, theirs = self.counts(student.images, said.images), said.visual
        as_they_are = not counts or student.images.tolist() == said.images.tolist()
        if isinstance(theirs, TopKSignal):
            if self.args.beta and not as_they_are:
                raise UserError(
                    f"visual_tokens: {self.args.visual_tokens} needs the teacher's hidden states, and this teacher "
                    "tells top-k log-probs only. Set beta: 0, or use a server of hidden states "
                    "(teacher_server_signal: hidden).",
                    because="meaning",
                )
            return ComparedTokens(
                pooled(student.visual, student.images.tolist(), counts), student.head, theirs, counts
            )
        if self.args.visual_tokens == "hungarian" and not as_they_are:
            ours_at, theirs_at = self._matched(student, theirs, said.images)
            chosen = DenseSignal(theirs.hidden[theirs_at], theirs.head)
            return ComparedTokens(student.visual[ours_at], student.head, chosen, counts)
        parts = student.images.tolist(), said.images.tolist()
        if not as_they_are and student.runs is not None and said.runs is not None:
            parts = tiles_of(parts[0], student.runs.tolist(), parts[1], said.runs.tolist())
        common = [common_tokens(*pair) for pair in zip(*parts, strict=True)] if counts else []
        states = pooled(theirs.hidden, parts[1], common)
        ours = pooled(student.visual, parts[0], common)
        return ComparedTokens(ours, student.head, DenseSignal(states, theirs.head), counts)

    def _matched(
        self, student: VisualSupervised, theirs: DenseSignal, images: Int[Tensor, "image"]
    ) -> tuple[Tensor, Tensor]:
        """The rows of student and teacher that belong together; images of equal numbers keep their order."""

        def cost(ours: Tensor, others: Tensor) -> Tensor:
            return logit_distances(ours, student.head, others, theirs.head, self.args.matching_cost)

        sizes = student.images.tolist(), images.tolist()
        return matched_by_image(student.visual, sizes[0], theirs.hidden, sizes[1], cost, ordered=True)

    def of(
        self, student: VisualSupervised, said: VisualSignal, repeatable: bool
    ) -> dict[str, tuple[str, Tensor, int]]:
        """By the term's name: the kind of its items, their sum, and their number. Terms of weight 0 are zeros."""
        compared = self.compared(student, said)
        tokens, images = sum(compared.counts), len(compared.counts)
        nothing = compared.ours.float().sum() * 0
        terms = {
            "visual_kl": ("visual_token", lambda: self._fused(compared, compared.theirs, forward_kl, repeatable)),
            "relation_distance": ("image", lambda: self._relation(compared, said.teacher, repeatable)),
            "visual_mse": ("visual_token", lambda: self._squared(compared, repeatable)),
            "alignment_distance": ("image", lambda: self._alignment(compared, student, said)),
        }
        counted = {"visual_token": tokens, "image": images}
        weights = self.args.visual_weights
        # The two terms of the paper are always reported, so that logs of several settings have the same columns.
        return {
            name: (kind, term() if weights[name] else nothing, counted[kind])
            for name, (kind, term) in terms.items()
            if weights[name] or name in ("visual_kl", "relation_distance")
        }

    def _fused(self, compared: ComparedTokens, theirs: Targets, objective: Objective, repeatable: bool) -> Tensor:
        args, hidden = self.args, compared.ours
        labels = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        settings = {"chunk_size": args.chunk_size, "precise": args.precise_logits, "repeatable": repeatable}
        return fused_loss(hidden, compared.head, labels, theirs, objective, **settings).total

    def _squared(self, compared: ComparedTokens, repeatable: bool) -> Tensor:
        assert isinstance(compared.theirs, DenseSignal)
        return self._fused(compared, RawSignal(compared.theirs), squared_difference, repeatable)

    def _relation(self, compared: ComparedTokens, teacher: str, repeatable: bool) -> Tensor:
        args, hidden, head, counts = self.args, compared.ours, compared.head, compared.counts
        theirs = compared.theirs
        assert isinstance(theirs, DenseSignal)
        normalized = args.relation_normalized
        if args.relation_on == "hidden":
            target = relations(theirs.hidden, counts, normalized=normalized)
            return relation_loss(hidden, counts, target, normalized=normalized, repeatable=repeatable)
        if teacher not in self.metrics:
            frozen = theirs.head.frozen()
            metric = logit_metric(frozen.weight, frozen.bias, centered=normalized)
            self.metrics = {**self.metrics, teacher: metric}
        target = relations(theirs.hidden, counts, self.metrics[teacher], normalized=normalized)
        weight, bias = head.weight[: head.vocab_size], None if head.bias is None else head.bias[: head.vocab_size]
        own = {"weight": weight, "bias": bias, "normalized": normalized}
        return relation_loss(hidden, counts, target, repeatable=repeatable, **own)

    def _alignment(self, compared: ComparedTokens, student: VisualSupervised, said: VisualSignal) -> Tensor:
        """Of each image with the tokens of its row's answer, which both sides share whatever their prompts are."""
        assert isinstance(compared.theirs, DenseSignal)
        assert isinstance(said.answer, DenseSignal)
        assert student.image_rows is not None
        assert student.token_rows is not None
        total = compared.ours.float().sum() * 0
        images = zip(
            student.image_rows.tolist(),
            compared.ours.split(compared.counts),
            compared.theirs.hidden.split(compared.counts),
            strict=True,
        )
        for row, ours, theirs in images:
            text = student.token_rows == row
            total = total + alignment_distance(ours, student.hidden[text], theirs, said.answer.hidden[text])
        return total
