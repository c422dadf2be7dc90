"""Losses of several terms, balanced by the norms of their gradients (GradMag).

With weights w_i and G_i the gradient of the term's mean in the last layer, term i is multiplied by
`w_i / |G_i| * sum(w) / sum(w_k / |G_k|)`: its gradient is as long as w_i times the weighted harmonic mean of all
norms. Where the norms are equal this is the weighted sum. The norms are those of a micro-batch over all ranks: ranks
weigh alike, while a batch that is accumulated from parts is balanced part by part, and rows that name their teachers
one teacher at a time. Evaluations are mixed by the weights.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mmkd.errors import UserError
from mmkd.losses.combine import combination_weights, gradients_of
from mmkd.models.backbone import last_layer

from .config import DistillationConfig


def balance_factors(
    means: Mapping[str, Tensor],
    weights: Mapping[str, float] | None,
    gradients_in: Callable[[Mapping[str, Tensor]], Tensor],
    summed: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """What each term is multiplied by; without weights all have the same.

    `gradients_in` gives a row per term, its gradient in the last layer. `summed` adds up over all ranks.
    """
    # Of all ranks, or each would weigh the terms in its own way.
    gradients = summed(gradients_in(means))
    shares = None if weights is None else {name: weights[name] for name in means}
    factors: Any = combination_weights("gradmag", list(means), shares, gradients)
    return factors


def gradients_in_last_layer(model: Any) -> Callable[[Sequence[Tensor]], Tensor]:
    """The gradient of each loss in the last layer, of a model whose ranks hold it whole."""
    return lambda losses: gradients_of(losses, trained(last_layer(model)))


def check_balance(model: Any, args: DistillationConfig) -> None:
    """Raises UserError where the last layer's gradients cannot be had before the backward pass."""
    if not trained(last_layer(model)):
        raise UserError(
            "combine: gradmag compares gradients in the last layer, of which nothing is trained. Set combine: "
            "weights, or train that layer too (trainable, target_modules, layers_to_transform).",
            because="not built",
        )
    checkpointing = args.activation_checkpointing_kwargs or {}
    assert isinstance(checkpointing, dict)
    if args.activation_checkpointing and checkpointing.get("use_reentrant"):
        raise UserError(
            "combine: gradmag differentiates before the backward pass, which reentrant checkpointing cannot. Set "
            "use_reentrant: false in activation_checkpointing_kwargs, or combine: weights.",
            because="upstream",
        )


def trained(layer: nn.Module) -> list[nn.Parameter]:
    """The parameters of a layer that are trained."""
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]
