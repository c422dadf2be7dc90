"""How several losses become one: their sum, a weighted sum, or weights that balance their gradients (GradMag)."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

COMBINATIONS = ("sum", "weights", "gradmag")


def combination_weights(
    combination: str,
    losses: Sequence[str],
    weights: Mapping[str, float] | None = None,
    gradients: Float[Tensor, "loss parameter"] | None = None,
) -> dict[str, float | Tensor]:
    """The factor of each of the named losses, without gradient.

    `sum`: 1 each. `weights`: those given. `gradmag`: see `gradmag_weights`; `gradients` has a row for each loss in
    turn. Raises ValueError for an unknown combination, and for weights that are missing, too many or of no use.
    """
    if combination not in COMBINATIONS:
        raise ValueError(f"Combination {combination!r} is unknown; choose one of {', '.join(COMBINATIONS)}.")
    if combination != "weights" and weights is not None:
        raise ValueError(f"Combination {combination} makes no use of weights; leave them out, or combine by weights.")
    if combination == "weights" and weights is None:
        raise ValueError(f"Combination weights needs a weight for each of {', '.join(losses)}.")
    if weights is not None:
        if set(weights) != set(losses):
            raise ValueError(f"There are weights for {', '.join(weights)}, but the losses are {', '.join(losses)}.")
        return {name: weights[name] for name in losses}
    if combination == "sum":
        return dict.fromkeys(losses, 1.0)
    assert gradients is not None, "gradmag needs the gradients of the losses"
    return dict(zip(losses, gradmag_weights(gradients), strict=True))


def gradmag_weights(gradients: Float[Tensor, "loss parameter"]) -> Float[Tensor, "loss"]:
    """The inverse norms of the gradients, scaled to a sum of 1, so that all weighted gradients are of one length.

    ALM's GradMag in the approximation that its authors train with: the gradients are those of the last layer only. A
    loss without any gradient (a batch without a chunk) weighs 0, where the authors let it stop all others.
    """
    wide = torch.promote_types(gradients.dtype, torch.float32)
    norms = torch.linalg.vector_norm(gradients.detach(), dim=-1, dtype=wide)
    inverse = torch.where(norms > 0, 1 / (norms + 1e-8), 0)
    return inverse / inverse.sum().clamp(min=torch.finfo(wide).tiny)


def gradients_of(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> Float[Tensor, "loss parameter"]:
    """The gradient of each loss by all the parameters in a row; the graph stays for the backward pass.

    The losses must be such as can be backpropagated twice, which that of `fused_loss` cannot. On several ranks these
    are the gradients of one rank: average them before their norms are taken, or ranks weigh differently.
    """
    rows = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)
