"""Combination of several losses: their sum, a weighted sum, or weights that balance their gradients (GradMag)."""

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

    `sum`: 1 each. `weights`: the given weights. `gradmag`: see `gradmag_weights`; `gradients` has one row per loss, in
    order, and the weights, if any, are the shares. Raises UserError for an unknown combination, for missing or excess
    weights, and for weights with `sum`.
    """
    if combination not in COMBINATIONS:
        raise UserError(f"Combination {combination!r} is unknown; choose one of {', '.join(COMBINATIONS)}.")
    if combination == "sum" and weights is not None:
        raise UserError(
            "Combination sum does not use weights; remove them, or choose combination weights.", because="meaning"
        )
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
    """`s_i / |G_i|`, scaled to the sum of the shares s: weighted gradients G have lengths proportional to the shares.

    Without shares, all weighted gradients have the same length and the weights sum to 1. This is ALM's GradMag with
    its magnitude preserved, in the approximation that its authors train with, the gradients of the last layer only. If
    all gradients have the same length, the weights are the shares themselves. A loss without a gradient (a batch
    without a chunk) has weight 0, and its share is not given to the others; in the authors' code it stops all
    others.
    """
    wide = torch.promote_types(gradients.dtype, torch.float32)
    # The squares of half-precision gradients overflow or vanish: the norm is taken in fp32.
    norms: Tensor = cast(Any, torch.linalg).vector_norm(gradients.detach(), dim=-1, dtype=wide)
    present = norms > 0
    lengths = present / present.sum().clamp(min=1) if shares is None else present * norms.new_tensor(shares)
    # The epsilon makes 0 / 0 a 0 for a loss without a gradient.
    weights = lengths / (norms + 1e-8)
    return weights * (lengths.sum() / weights.sum().clamp(min=torch.finfo(wide).tiny))


def gradients_of(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> Float[Tensor, "loss parameter"]:
    """The gradient of each loss with respect to all parameters, flattened into one row; the graph is kept.

    The losses must allow a second backward pass, as those of `fused_loss` and `relation_loss` do with `repeatable`. On
    several ranks these are the gradients of one rank: sum them over ranks before their norms are taken, or every rank
    computes weights of its own.
    """
    rows: list[Tensor] = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)
