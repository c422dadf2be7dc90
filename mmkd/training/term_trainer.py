"""How the terms of a loss over tokens are computed and added up, which several methods share."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmkd.losses.divergences import forward_kl
from mmkd.losses.fused import MixedTargets, Objective, Targets, fused_loss
from mmkd.models.last_block import LastBlock

from .balance import balance_factors, gradients_in_last_layer
from .items import DATA_TOKEN, ItemLosses, Reports, Supervised, Terms
from .reports import ReportingTrainer
from .token_weights import importance_weights


class TermTrainer(ReportingTrainer):
    """Divergence and cross-entropy of tokens: in one pass, apart, or balanced."""

    args: Any
    _counts: dict[str, Tensor]
    """Kind of item -> how many the accumulated batch has on all ranks."""
    _last_block: LastBlock | None = None
    """Where losses are balanced and the student is sharded."""

    @property
    def balances(self) -> bool:
        """Whether the terms of this pass are to be balanced."""
        return self.args.combine == "gradmag" and self.model.training

    @property
    def parts_tokens(self) -> bool:
        """Whether there is a cross-entropy, of the data's answers, beside terms of the student's own answers too."""
        return bool(self.args.on_policy_fraction) and self.args.term_weights.get("ce", 0) > 0

    def fused(
        self,
        student: Supervised,
        signal: Targets | MixedTargets | None,
        objective: Objective = forward_kl,
        temperature: float = 1.0,
        weights: Float[Tensor, "token"] | None = None,
    ) -> ItemLosses:
        """The item losses of a token-level divergence and cross-entropy, weighted or balanced, with all reports.

        `weights` are those of the tokens, by default `token_weights`, which the signal must be as the teacher gave it
        for. Their sum is divided by the number of tokens, whatever the weights. Cross-entropy is of the data's
        answers only, and a mean over their tokens.
        """
        weights = self.token_weights(student, signal) if weights is None else weights
        if self.balances or self.parts_tokens:
            terms, reports = self.apart(student, signal, objective, temperature, weights)
            return ItemLosses(self.combined(terms), reports)
        # One pass computes a mixture of the two.
        ce = self.args.term_weights["ce"]
        scale = self.args.term_weights["divergence"] + ce
        losses = self.mixed(student, signal, objective, temperature, ce / scale if scale else 0.0, weights)
        return ItemLosses({kind: scale * total for kind, total in losses.totals.items()}, losses.reports)

    def combined(self, terms: Terms) -> dict[str, Tensor]:
        """What the terms add up to per kind of item, each times its weight, or balanced."""
        weights = self.args.term_weights
        if self.balances:
            return self.balanced(terms, weights)
        return ItemLosses.added(
            {kind: weights[name] * total for kind, total in term.items()} for name, term in terms.items()
        )

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
        divergence = self.mixed(student, signal, objective, temperature, 0.0, weights)
        ce, reports = self.cross_entropy(student, weights)
        return {"divergence": divergence.totals, "ce": ce}, divergence.reports | reports

    def cross_entropy(
        self, student: Supervised, weights: Float[Tensor, "token"] | None
    ) -> tuple[dict[str, Tensor], Reports]:
        """Cross-entropy alone, of tokens that the student did not say itself, and its report."""
        if self.parts_tokens:
            data = ~student.own
            student, weights = student.at(data), None if weights is None else weights[data]
        ce = self.mixed(student, None, forward_kl, 1.0, 1.0, weights)
        return {DATA_TOKEN if self.parts_tokens else "token": ce.totals["token"]}, {"ce": ce.reports["ce"]}

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

    def mixed(
        self,
        student: Supervised,
        signal: Targets | MixedTargets | None,
        objective: Objective,
        temperature: float,
        ce_weight: float,
        weights: Tensor | None,
    ) -> ItemLosses:
        """Divergence and cross-entropy of each token in one pass through the head, with all reports."""
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
