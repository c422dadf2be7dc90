"""Losses of several terms: mixed by their weights, or balanced by the norms of their gradients (GradMag)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mmkd.errors import UserError
from mmkd.losses.combine import combination_weights, gradients_of
from mmkd.losses.divergences import forward_kl
from mmkd.losses.fused import Objective
from mmkd.models.backbone import last_layer
from mmkd.models.sharded_weights import is_sharded

from .base import DistillationTrainer
from .items import ItemLosses, Supervised


class BalancedTrainer(DistillationTrainer):
    """A trainer whose loss has several terms, which `combine: gradmag` scales to gradients of a common norm.

    With weights w_i and G_i the gradient of the term's mean in the last layer, term i is multiplied by
    `w_i / |G_i| * sum(w) / sum(w_k / |G_k|)`: its gradient is as long as w_i times the weighted harmonic mean of all
    norms. Where the norms are equal this is the weighted sum. The norms are those of a micro-batch over all ranks:
    ranks weigh alike, while a batch that is accumulated from parts is balanced part by part, and rows that name their
    teachers one teacher at a time. Evaluations are mixed by the weights.

    Raises UserError too where the last layer's gradients cannot be had before the backward pass.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.args.combine == "gradmag":
            self._check_balance()

    @property
    def balances(self) -> bool:
        """Whether the terms of this pass are to be balanced."""
        return self.args.combine == "gradmag" and self.model.training

    def fused(
        self,
        student: Supervised,
        signal: Any,
        objective: Objective = forward_kl,
        temperature: float = 1.0,
        ce_weight: float | None = None,
    ) -> ItemLosses:
        """The base's item losses, balanced where that is asked for."""
        if not self.balances:
            return super().fused(student, signal, objective, temperature, ce_weight)
        terms, reports = self.apart(student, signal, objective, temperature)
        return ItemLosses(self.balanced(terms, dict.fromkeys(terms, "token"), self.args.term_weights), reports)

    def apart(
        self, student: Supervised, signal: Any, objective: Objective = forward_kl, temperature: float = 1.0
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Divergence and cross-entropy, each by a pass of its own through the head, and the reports of both."""
        divergence = super().fused(student, signal, objective, temperature, ce_weight=0.0)
        ce = super().fused(student, None, ce_weight=1.0)
        return {"divergence": divergence.totals["token"], "ce": ce.totals["token"]}, ce.reports | divergence.reports

    def balanced(
        self, terms: Mapping[str, Tensor], items: Mapping[str, str], weights: Mapping[str, float] | None = None
    ) -> dict[str, Tensor]:
        """What the terms, each a sum over `items` of a kind, add up to per kind of item when they are balanced.

        Terms of weight 0 are left out; without weights all have the same. Logs each factor as `balance/<term>`.
        """
        counted = [name for name in terms if weights is None or weights[name]]
        means = [terms[name] / self._counts[items[name]].clamp(min=1) for name in counted]
        # Of all ranks, or each would weigh the terms in its own way.
        gradients = self._summed(gradients_of(means, trained(last_layer(self.model))))
        shares = None if weights is None else {name: weights[name] for name in counted}
        factors: dict[str, Any] = combination_weights("gradmag", counted, shares, gradients)
        # A term without gradient, of a teacher without rows say, has no factor to speak of.
        self._record({f"balance/{name}": (factor, factor > 0) for name, factor in factors.items()})
        totals: dict[str, Tensor] = {}
        for name, factor in factors.items():
            total = terms[name] * factor
            totals[items[name]] = totals[items[name]] + total if items[name] in totals else total
        return totals

    def _check_balance(self) -> None:
        if is_sharded(self.accelerator):
            raise UserError(
                "combine: gradmag needs gradients of the last layer before the backward pass, when FSDP and ZeRO-3 "
                "have put its weights away. Set combine: weights, or train with accelerate_config ddp or zero2."
            )
        if not trained(last_layer(self.model)):
            raise UserError(
                "combine: gradmag compares gradients in the last layer, of which nothing is trained. Set combine: "
                "weights, or train that layer too (trainable, target_modules, layers_to_transform)."
            )
        checkpointing = self.args.activation_checkpointing_kwargs or {}
        assert isinstance(checkpointing, dict)
        if self.args.activation_checkpointing and checkpointing.get("use_reentrant"):
            raise UserError(
                "combine: gradmag differentiates before the backward pass, which reentrant checkpointing cannot. Set "
                "use_reentrant: false in activation_checkpointing_kwargs, or combine: weights."
            )


def trained(layer: nn.Module) -> list[nn.Parameter]:
    """The parameters of a layer that are trained."""
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]
