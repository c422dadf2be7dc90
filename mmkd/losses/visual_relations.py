"""RDist of LLaVA-KD (2410.16236): the relations between the visual tokens of an image, student against teacher.

The relation matrix of an image is R = Z Z^T over its K visual tokens. With Z the logits, over a vocabulary of 152k, it
is R = H (W^T W) H^T: the logits are never formed, and W^T W is shared by all images of a batch.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from .projection import ReadyGradients

# The number of rows of the head that are copied to fp32 at a time.
_ROWS = 8192


def relations(
    hidden: Float[Tensor, "visual width"],
    tokens: Sequence[int],
    metric: Float[Tensor, "width1 width1"] | None = None,
    *,
    normalized: bool = False,
) -> list[Float[Tensor, "token token"]]:
    """R of each image, in fp32 or better; image i has the next `tokens[i]` rows of `hidden`.

    With a `metric` (of `logit_metric`) R is that of the logits, else that of the hidden states. `normalized` gives the
    correlation: features are centred and every row has unit length, so that neither a constant added to all logits of
    a token nor its norm matters. Logits are centred by a centred metric. The type is float32 under any autocast, since
    an entry sums as many products as there are tokens in the vocabulary, which overflows fp16.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        states = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if metric is not None:
            states = torch.cat([states, torch.ones_like(states[:, :1])], dim=-1)
        elif normalized:
            states = states - states.mean(-1, keepdim=True)
        matrices: list[Tensor] = []
        for image in torch.split(states, list(tokens)):
            relation = image @ image.T if metric is None else image @ metric.to(image) @ image.T
            if normalized:
                # The diagonal holds the squared lengths of the logits, which are not formed.
                length = relation.diagonal().clamp(min=torch.finfo(relation.dtype).tiny).rsqrt()
                relation = length[:, None] * relation * length
            matrices.append(relation)
        return matrices


@torch.no_grad()
def logit_metric(
    weight: Float[Tensor, "token width"], bias: Float[Tensor, "token"] | None = None, *, centered: bool = False
) -> Float[Tensor, "width1 width1"]:
    """W^T W of the head, with its bias as one more column, in fp32 or better: (h, 1) M (h, 1)^T is z z^T.

    `centered` first subtracts the mean over the vocabulary from every logit, to which the softmax is invariant.
    """
    total: Tensor | float = 0.0
    with torch.autocast(weight.device.type, enabled=False):
        mean = _mean_row(weight, bias) if centered else 0.0
        for rows in _blocks(weight, bias):
            rows = rows - mean
            total = total + rows.T @ rows
    assert isinstance(total, Tensor)
    return total


def relation_distance(student: Float[Tensor, "token token"], teacher: Float[Tensor, "token token"]) -> Tensor:
    """1 - cos of the two relation matrices of an image, flattened; in [0, 2], and 1 if one of them is zero."""
    return 1 - torch.cosine_similarity(student.flatten(), teacher.to(student).flatten(), dim=0)


def relation_loss(
    hidden: Float[Tensor, "visual width"],
    tokens: Sequence[int],
    teacher: Sequence[Float[Tensor, "token token"]],
    *,
    weight: Float[Tensor, "token width"] | None = None,
    bias: Float[Tensor, "token"] | None = None,
    normalized: bool = False,
    repeatable: bool = False,
) -> Float[Tensor, ""]:
    """Sum over images of `relation_distance` to the teacher's relations: of logits with a head, else of hidden states.

    The gradients of hidden states and head are computed in the forward pass, in which a sharded head is gathered. They
    serve one backward pass, or with `repeatable` as many as the graph is kept for.
    """
    job = (list(tokens), list(teacher), normalized)
    if torch.is_grad_enabled():
        return cast(Any, _RelationLoss).apply(hidden, weight, bias, job, repeatable)
    metric = None if weight is None else logit_metric(weight, bias, centered=normalized)
    return _sum_of_distances(hidden, metric, job)


def common_tokens(student: int, teacher: int) -> int:
    """The number of visual tokens of an image that can be compared: that of the side with fewer tokens."""
    return min(student, teacher)


def tiles_of(
    student: Sequence[int], student_runs: Sequence[int], teacher: Sequence[int], teacher_runs: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The visual tokens of both sides, image by image, or tile by tile where both cut an image into as many tiles.

    A run are tokens of one image without another token between them.
    """
    ours, theirs = _runs_by_image(student, student_runs), _runs_by_image(teacher, teacher_runs)
    parts: tuple[list[int], list[int]] = [], []
    for own, other in zip(ours, theirs, strict=True):
        # As many tokens are compared as of the whole image.
        alike = len(own) == len(other) and sum(map(min, own, other)) == min(sum(own), sum(other))
        for part, runs in zip(parts, (own, other), strict=True):
            part += runs if alike else [sum(runs)]
    return parts


def _runs_by_image(images: Sequence[int], runs: Sequence[int]) -> list[list[int]]:
    """The runs of each image; an image that shares one with another counts as one itself."""
    left = list(runs)
    by_image: list[list[int]] = []
    for size in images:
        count = 0
        while sum(left[:count]) < size and count < len(left):
            count += 1
        beyond = sum(left[:count]) - size
        by_image.append([size] if beyond else left[:count])
        left = [beyond, *left[count:]] if beyond else left[count:]
    return by_image


def pooled(
    hidden: Float[Tensor, "visual width"], tokens: Sequence[int], common: Sequence[int]
) -> Float[Tensor, "common width"]:
    """The states of each image, averaged to a common number of visual tokens (our extension of the paper).

    If both numbers are squares, tokens are taken for a grid of patches and averaged in two dimensions, otherwise along
    the sequence. The logits of an average of hidden states are, before a softcap, the average of their logits.
    Without `common` images there are no states.
    """
    if list(tokens) == list(common):
        return hidden
    if not common:
        return hidden[:0]
    parts: list[Tensor] = []
    for image, size, target in zip(torch.split(hidden, list(tokens)), tokens, common, strict=True):
        side, target_side = math.isqrt(size), math.isqrt(target)
        if side**2 == size and target_side**2 == target:
            grid = image.T.reshape(-1, side, side)
            parts.append(torch.nn.functional.adaptive_avg_pool2d(grid, target_side).flatten(1).T)
        else:
            parts.append(torch.nn.functional.adaptive_avg_pool1d(image.T, target).T)
    return torch.cat(parts)


_Job = tuple[list[int], list[Tensor], bool]
"""(visual tokens of each image, the teacher's relation of each, normalized)"""


def _sum_of_distances(hidden: Tensor, metric: Tensor | None, job: _Job) -> Tensor:
    tokens, teacher, normalized = job
    student = relations(hidden, tokens, metric, normalized=normalized)
    distances = [relation_distance(ours, theirs) for ours, theirs in zip(student, teacher, strict=True)]
    # Without images the loss is a zero that still belongs to the graph, or ranks without images would not reduce.
    return torch.stack(distances).sum() if distances else hidden.float().sum() * 0


class _RelationLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, job: _Job, repeatable: bool
    ) -> Tensor:
        needs_head = any(ctx.needs_input_grad[1:3])
        with torch.enable_grad():
            states = hidden.detach().requires_grad_()
            metric = None if weight is None else logit_metric(weight, bias, centered=job[2])
            inputs = [states]
            if metric is not None and needs_head:
                inputs.append(metric.requires_grad_())
            loss = _sum_of_distances(states, metric, job)
            grads: Sequence[Tensor | None] = torch.autograd.grad(loss, inputs, allow_unused=True)
        gradients: list[Tensor | None] = [grads[0], None, None]
        grad_metric: Tensor | None = grads[1] if needs_head else None
        # Without images the metric is not used, and the head has no gradient.
        if weight is not None and grad_metric is not None:
            gradients[1:] = _head_gradients(weight, bias, grad_metric, centered=job[2])
        needs: tuple[bool, ...] = ctx.needs_input_grad[:3]
        needed_gradients = [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]
        ctx.gradients = ReadyGradients(needed_gradients, repeatable)
        return loss.detach()

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_loss: Tensor
    ) -> tuple[Tensor | None, ...]:
        return *ctx.gradients.scaled(grad_loss), None, None


def _head_gradients(
    weight: Tensor, bias: Tensor | None, grad_metric: Tensor, centered: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of weight and bias from that of W^T W.

    The mean row of a centred metric depends on the weight too, but adds nothing: centred rows sum to zero.
    """
    symmetric = grad_metric + grad_metric.T
    grad_weight = torch.empty_like(weight)
    grad_bias = None if bias is None else torch.empty_like(bias)
    with torch.autocast(weight.device.type, enabled=False):
        mean = _mean_row(weight, bias) if centered else 0.0
        start = 0
        for rows in _blocks(weight, bias):
            block = (rows - mean) @ symmetric
            grad_weight[start : start + len(rows)] = block[:, :-1]
            if grad_bias is not None:
                grad_bias[start : start + len(rows)] = block[:, -1]
            start += len(rows)
    return grad_weight, grad_bias


def _mean_row(weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.stack([rows.sum(0) for rows in _blocks(weight, bias)]).sum(0) / len(weight)


def _blocks(weight: Tensor, bias: Tensor | None) -> Iterator[Tensor]:
    wide = torch.promote_types(weight.dtype, torch.float32)
    for start in range(0, len(weight), _ROWS):
        rows = weight.detach()[start : start + _ROWS].to(wide)
        column = rows.new_zeros(len(rows)) if bias is None else bias.detach()[start : start + _ROWS].to(wide)
        yield torch.cat([rows, column[:, None]], dim=-1)
