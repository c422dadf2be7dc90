"""Rows of all ranks: gathered so that a loss of one rank reaches the features of the others."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    """All ranks' rows, one rank's after the other's; the gradient of a row is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        if dist.get_backend() == "nccl":
            own = gradient.new_empty(ctx.rows, *gradient.shape[1:])
            dist.reduce_scatter_tensor(own, gradient)
            return own
        # gloo gathers, and does not scatter sums.
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        first = dist.get_rank() * ctx.rows
        return gradient[first : first + ctx.rows]


def ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered(rows: Tensor) -> Tensor:
    """The rows of all ranks, which must have equally many; a loss of any rank gives its gradient to all of them."""
    whole: Any = rows if ranks() == 1 else _Gather.apply(rows)
    return whole


def first_of(rows: int) -> int:
    """The place of this rank's first row among those of all ranks."""
    return rows * dist.get_rank() if ranks() > 1 else 0
