"""The terms of DHO's loss beside those of its two heads: embeddings, aspects, inner stages and the gate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkd.data.classification import HIDDEN
from mmkd.losses import open_vocabulary as words
from mmkd.losses.class_objectives import aspect_loss, class_objective
from mmkd.losses.dual_head_losses import supervised_loss
from mmkd.losses.gated_teachers import balance_loss, blended_logits, gated_loss
from mmkd.teachers.class_signals import ClassSignals
from mmkd.training.gathering import first_of, gathered

from .dho_config import DHOConfig

_OVER_ROWS = {"image_contrast", "caption"}

Reports = dict[str, tuple[Tensor, Any]]
Terms = dict[str, tuple[Tensor, Tensor | float, Tensor]]
"""Of each term: its sum over some rows, how many they are, and of how many rows of the accumulated batch."""


@dataclass(frozen=True)
class Counts:
    """Rows of an accumulated batch over all ranks."""

    labeled: Tensor
    unlabeled: Tensor
    aligned: Tensor
    """Those that vl_align counts."""

    @property
    def rows(self) -> Tensor:
        """All of them."""
        return self.labeled + self.unlabeled

    def mean(self, losses: Tensor, shown: Tensor) -> Tensor:
        """The mean over labelled rows and that over the others, added up, of this micro-batch's share (eq. 6)."""
        labeled, unlabeled = self.labeled.clamp(min=1), self.unlabeled.clamp(min=1)
        return losses[shown].sum() / labeled + losses[~shown].sum() / unlabeled


class RowsSaid(NamedTuple):
    """What the student says of rows that are compared with each other."""

    embeds: Tensor | None = None
    gate: Tensor | None = None

    @property
    def known(self) -> list[Tensor]:
        """Those of the two that are read."""
        return [tensor for tensor in self if tensor is not None]

    @classmethod
    def joined(cls, parts: Sequence["RowsSaid"]) -> "RowsSaid":
        """Of all rows of an accumulated batch, as leaves of a graph of their own."""
        columns = [[tensor for tensor in own if tensor is not None] for own in zip(*parts, strict=True)]
        return cls(*(torch.cat(own).detach().requires_grad_() if own else None for own in columns))


class ClassTerms:
    """Losses by the settings and by what the teachers said."""

    def __init__(self, args: DHOConfig, signals: ClassSignals):
        assert args.temperature is not None
        self.args, self.signals = args, signals
        self._objective = class_objective(args.kd_loss, args.temperature, args.ofa_epsilon)

    def counts(self, batches: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """Labelled rows, the others, and those that vl_align counts, of the micro-batches of this rank."""
        labeled = sum(int((batch["labels"] != HIDDEN).sum()) for batch in batches)
        rows = sum(len(batch["labels"]) for batch in batches)
        aligned = rows
        if "vl_align" in self.args.term_weights and self.args.vl_align_filter:
            aligned = sum(int(self._aligned(batch).sum()) for batch in batches)
        return torch.tensor([labeled, rows - labeled, aligned], device=device)

    def distilled(
        self, student: Tensor, teacher: Tensor, labels: Tensor, extra: Mapping[str, Tensor] | None
    ) -> Tensor:
        """The loss of each row on the teacher's logits, or on those of several teachers."""
        if teacher.ndim == 2:
            return self._objective(student, teacher, labels)
        gate = None if extra is None or "gate" not in extra else extra["gate"].float()
        if self.args.mixing == "blended":
            assert gate is not None
            return self._objective(student, blended_logits(teacher, gate), labels)
        losses = torch.stack([self._objective(student, logits, labels) for logits in teacher.unbind(1)], 1)
        if self.args.mixing == "learned":
            assert gate is not None
            return gated_loss(losses, gate, self.args.gate_top_k)
        weights = losses.new_tensor(self.signals.weights or (1.0,) * losses.shape[1])
        return losses @ (weights / weights.sum())

    def stages(self, extra: Mapping[str, Tensor], teacher: Tensor, labels: Tensor) -> Tensor | None:
        """The sum over stages of the loss of each row on the teacher; None without stages."""
        stages = [logits for name, logits in extra.items() if name.startswith("stage_")]
        if not stages:
            return None
        return torch.stack([self.distilled(logits, teacher, labels, extra) for logits in stages]).sum(0)

    def others(self, outputs: Any, batch: Mapping[str, Tensor], counts: Counts) -> tuple[Tensor | None, Reports]:
        """The weighted sum of the terms of each row's embedding and aspects; None where there is none of them."""
        terms: Terms = {}
        labels = batch["labels"]
        rows = torch.as_tensor(len(labels), device=labels.device)
        if self.args.term_weights:
            terms |= self._embedded(outputs.embeds, batch, counts)
        extra = outputs.extra or {}
        if "aspects" in extra:
            losses = aspect_loss(extra["aspects"], batch["teacher_aspects"])
            terms["aspects"] = (losses.sum(), rows, counts.rows)
        return self._weighed(terms)

    def across(self, said: RowsSaid, batch: Mapping[str, Tensor], counts: Counts) -> tuple[Tensor | None, Reports]:
        """The weighted sum of the terms that compare rows, of all ranks; `said` and `batch` are of this rank's.

        The sum over the ranks is the loss. None where there is no such term.
        """
        terms: Terms = {}
        labels, weights = batch["labels"], self.args.term_weights
        rows = torch.as_tensor(len(labels), device=labels.device)
        if said.gate is not None:
            gates = gathered(said.gate.float().softmax(-1))
            balance = balance_loss(gates.mean(0), self.args.gate_balance)
            terms["gate_balance"] = (balance * rows, rows, counts.rows)
        if said.embeds is not None and "feature_mse" in weights and self.args.feature_mse_form == "log":
            losses = words.feature_distance(said.embeds, batch["teacher_images"], "log")
            total = words.log_distance(gathered(losses).mean()) * rows
            terms["feature_mse"] = (total, rows, counts.rows)
        if weights.keys() & _OVER_ROWS:
            assert said.embeds is not None
            terms |= self._in_batch(said.embeds, batch, counts)
        return self._weighed(terms)

    def compared(self, outputs: Any) -> RowsSaid:
        """What terms that compare rows read of the student's output; nothing where there is no such term."""
        gate = (outputs.extra or {}).get("gate") if self.args.gate_balance != "none" else None
        return RowsSaid(outputs.embeds if self._compares_embeddings else None, gate)

    @property
    def compares_rows(self) -> bool:
        """Whether a term is no sum over rows."""
        args = self.args
        return self._compares_embeddings or (args.distils and args.gated and args.gate_balance != "none")

    @property
    def _compares_embeddings(self) -> bool:
        weights = self.args.term_weights
        log = "feature_mse" in weights and self.args.feature_mse_form == "log"
        return log or bool(weights.keys() & _OVER_ROWS)

    def _weighed(self, terms: Terms) -> tuple[Tensor | None, Reports]:
        if not terms:
            return None, {}
        weights = {"aspects": self.args.aspects_weight, "gate_balance": self.args.gate_balance_weight}
        weights |= self.args.term_weights
        total = torch.stack([weights[name] * loss / of.clamp(min=1) for name, (loss, _, of) in terms.items()]).sum()
        return total, {name: (loss, items) for name, (loss, items, _) in terms.items()}

    def _embedded(self, embeds: Tensor, batch: Mapping[str, Tensor], counts: Counts) -> Terms:
        args, labels = self.args, batch["labels"]
        assert self.signals.embeddings is not None
        text = self.signals.embeddings.text.to(embeds.device)
        images, shown = batch["teacher_images"], labels != HIDDEN
        rows, tau = torch.as_tensor(len(labels), device=labels.device), args.text_temperature
        terms: Terms = {}
        weights = args.term_weights
        if "text_ce" in weights:
            losses = supervised_loss(words.text_logits(embeds[shown], text, tau), labels[shown])
            # A sum over no rows still belongs to the graph.
            terms["text_ce"] = (losses.sum() + 0 * embeds.float().sum(), shown.sum(), counts.labeled)
        if "vl_align" in weights:
            keep = self._aligned(batch) if args.vl_align_filter else torch.ones_like(shown)
            losses = words.alignment_loss(embeds, images, text, args.vl_align_top_k, tau)
            terms["vl_align"] = ((losses * keep).sum(), keep.sum(), counts.aligned)
        if "feature_mse" in weights and args.feature_mse_form == "normalized":
            terms["feature_mse"] = (words.feature_distance(embeds, images).sum(), rows, counts.rows)
        return terms

    def _in_batch(self, embeds: Tensor, batch: Mapping[str, Tensor], counts: Counts) -> Terms:
        """Terms that find what belongs to a row among all rows."""
        weights, labels = self.args.term_weights, batch["labels"]
        first = first_of(len(labels))
        own, everybody = slice(first, first + len(labels)), gathered(embeds.float())
        rows = torch.as_tensor(len(labels), device=labels.device)
        terms: Terms = {}
        if "image_contrast" in weights:
            images = gathered(batch["teacher_images"])
            args = self.args
            losses = words.image_contrast(everybody, images, args.text_temperature, args.image_contrast_both_ways)
            terms["image_contrast"] = (losses[own].sum(), rows, counts.rows)
        if "caption" in weights:
            losses = words.caption_loss(everybody, gathered(batch["teacher_captions"]), gathered(labels))
            terms["caption"] = (losses[own].sum(), rows, counts.rows)
        return terms

    def _aligned(self, batch: Mapping[str, Tensor]) -> Tensor:
        assert self.signals.embeddings is not None
        images = batch["teacher_images"]
        return words.agreeing_rows(images, self.signals.embeddings.text.to(images.device), batch["labels"])
