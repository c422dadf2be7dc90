"""A loss over tokens: forward and reverse KL, mixed."""

from dataclasses import dataclass, field
from typing import Any

from mmkd.losses.divergences import forward_kl, reverse_kl
from mmkd.schema import Share
from mmkd.training.base import DistillationTrainer
from mmkd.training.config import DistillationConfig
from mmkd.training.items import ItemLosses, Supervised
from mmkd.training.method import Method


@dataclass
class SymmetricKLConfig(DistillationConfig):
    """Settings of method symmetric_kl."""

    forward_share: Share = field(default=0.5, metadata={"help": "Share of the forward KL; reverse KL has the rest."})


class SymmetricKLTrainer(DistillationTrainer):
    """Minimises a mixture of forward and reverse KL."""

    method = "symmetric_kl"
    config_class = SymmetricKLConfig
    args: SymmetricKLConfig

    def item_losses(self, student: Supervised, signal: Any) -> ItemLosses:
        """One mixed divergence per supervised token."""
        share = self.args.forward_share
        return self.fused(student, signal, lambda s, t: share * forward_kl(s, t) + (1 - share) * reverse_kl(s, t))


METHOD = Method(SymmetricKLTrainer)
