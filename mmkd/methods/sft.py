"""Supervised fine-tuning through the same step: the baseline that every method is compared with."""

from dataclasses import dataclass, field

from mmkd.errors import UserError
from mmkd.losses.fused import Targets
from mmkd.schema import Share
from mmkd.training.base import DistillationTrainer
from mmkd.training.config import DistillationConfig
from mmkd.training.items import ItemLosses, Supervised
from mmkd.training.method import Method


@dataclass
class SFTBaselineConfig(DistillationConfig):
    """Settings of method sft: those of every method, with nothing but cross-entropy in the loss."""

    ce_weight: Share = field(default=1.0, metadata={"help": "Always 1. The loss of this baseline has no other term."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ce_weight != 1:
            raise UserError(
                f"ce_weight is {self.ce_weight}, but sft has cross-entropy only; use method kd to mix.",
                because="meaning",
            )


class SFTBaselineTrainer(DistillationTrainer[Targets | None]):
    """Cross-entropy with the data's tokens. A teacher is optional and only measures: it never enters the loss."""

    method = "sft"
    takes_several = True
    config_class = SFTBaselineConfig
    needs_teacher = False

    def item_losses(self, student: Supervised, signal: Targets | None) -> ItemLosses:
        """One cross-entropy per supervised token."""
        return self.fused(student, signal)


METHOD = Method(SFTBaselineTrainer, unused={"ce_weight": "Always 1: the loss has no other term."})
