"""How several losses become one: their sum, a weighted sum, or weights that balance their gradients (GradMag)."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from mmkd.errors import UserError

COMBINATIONS = ("sum", "weights", "gradmag")


def combination_weights(
    combination: str,
    losses: Sequence[str],
    weights: Mapping[str, float] | None = None,
    gradients: Float[Tensor, "loss parameter"] | None = None,
) -> dict[str, float | Tensor]:
    """The factor of each of the named losses, without gradient.

    `sum`: 1 each. `weights`: those passed in. `gradmag`: see `gradmag_weights`; `gradients` has a row for each loss in
    order, and `weights`, if any, are its shares. Raises UserError for an unknown combination, and for weights that are
    missing, superfluous or not used.
    """
    if combination not in COMBINATIONS:
        raise UserError(f"Combination {combination!r} is unknown; choose one of {', '.join(COMBINATIONS)}.")
    if combination == "sum" and weights is not None:
        raise UserError("Combination sum does not use weights; remove them, or choose combination weights.")
    if combination == "weights" and weights is None:
        raise UserError(f"Combination weights needs a weight for each of {', '.join(losses)}.")
    if weights is not None and set(weights) != set(losses):
        raise UserError(f"There are weights for {', '.join(weights)}, but the losses are {', '.join(losses)}.")
    if combination == "sum":
        return dict.fromkeys(losses, 1.0)
    shares = None if weights is None else [weights[name] for name in losses]
    if combination == "weights":
        assert shares is not None
        return dict(zip(losses, shares, strict=True))
    assert gradients is not None, "gradmag needs the gradients of the losses"
    return dict(zip(losses, gradmag_weights(gradients, shares), strict=True))


def gradmag_weights(
    gradients: Float[Tensor, "loss parameter"], shares: Sequence[float] | None = None
) -> Float[Tensor, "loss"]:
    """`s_i / |G_i|`, scaled to the sum of the shares s, so that the weighted gradients G are as long as their shares.

    Without shares, all weighted gradients are of one length and the weights sum to 1: ALM's GradMag with its magnitude
    preserved, in the approximation that its authors train with, the gradients of the last layer only. With shares, the
    weights are the shares themselves where all gradients are of one length. A loss without any gradient (a batch
    without a chunk) weighs 0 and its share is not given to others; the authors let it stop all others.
    """
    wide = torch.promote_types(gradients.dtype, torch.float32)
    norms: Tensor = cast(Any, torch.linalg).vector_norm(gradients.detach(), dim=-1, dtype=wide)
    present = norms > 0
    lengths = present / present.sum().clamp(min=1) if shares is None else present * norms.new_tensor(shares)
    weights = lengths / (norms + 1e-8)
    return weights * (lengths.sum() / weights.sum().clamp(min=torch.finfo(wide).tiny))


def gradients_of(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> Float[Tensor, "loss parameter"]:
    """The gradient of each loss by all the parameters in a row; the graph stays for the backward pass.

    The losses must be such as can be backpropagated twice; those of `fused_loss` and `relation_loss` are where they
    are made `repeatable`. On several ranks these are the gradients of one rank: sum them before their norms are taken,
    or ranks weigh differently.
    """
    rows: list[Tensor] = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)
