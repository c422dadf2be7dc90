"""Log-probabilities of tokens from hidden states, with the logits of one chunk of tokens at a time.

The fused loss knows its gradient before the backward pass. These values go into a function that mixes tokens
(likelihoods of chunks, ALM), so that the weight of each token is known only in the backward pass, which therefore
computes the logits again.
"""

from typing import Any, cast, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmkd.errors import UserError

from .projection import Head, HeadGradients, Projection, check_labels


@overload
def token_log_probs(
    hidden: Float[Tensor, "token width"],
    head: Head,
    labels: Int[Tensor, "token"],
    outcomes: None = None,
    *,
    chunk_size: int = 512,
    precise: bool = False,
) -> tuple[Float[Tensor, "token"], None]: ...


@overload
def token_log_probs(
    hidden: Float[Tensor, "token width"],
    head: Head,
    labels: Int[Tensor, "token"],
    outcomes: Bool[Tensor, "vocab"],
    *,
    chunk_size: int = 512,
    precise: bool = False,
) -> tuple[Float[Tensor, "token"], Float[Tensor, "token"]]: ...


def token_log_probs(
    hidden: Float[Tensor, "token width"],
    head: Head,
    labels: Int[Tensor, "token"],
    outcomes: Bool[Tensor, "vocab"] | None = None,
    *,
    chunk_size: int = 512,
    precise: bool = False,
) -> tuple[Float[Tensor, "token"], Float[Tensor, "token"] | None]:
    """The log-probs of the labels, and of the set of tokens `outcomes` as a whole, in nats, differentiable, in fp32.

    Row i of `hidden` predicts `labels[i]`. Autocast and `precise` have the same meaning as in the fused loss; unlike
    there, the result can be backpropagated as often as its graph is kept. `outcomes` may cover more tokens than the
    head has. Raises UserError for a label outside the head's vocabulary, for fewer outcomes than the head has tokens,
    and for an empty set.
    """
    check_labels(labels, head.vocab_size)
    if outcomes is not None and len(outcomes) < head.vocab_size:
        raise UserError(
            f"The set of outcomes covers {len(outcomes)} tokens but the head has {head.vocab_size}; "
            "make it from the tokenizer of this model."
        )
    if outcomes is not None and not outcomes[: head.vocab_size].any():
        raise UserError("The set of outcomes holds no token of the head, so that its probability is always 0.")
    projection = Projection.here(hidden, head, chunk_size, precise)
    outcomes = None if outcomes is None else outcomes[: head.vocab_size].to(hidden.device)
    return cast(Any, _TokenLogProbs).apply(hidden, head.weight, head.bias, labels, outcomes, projection)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        outcomes: Tensor | None,
        projection: Projection,
    ) -> tuple[Tensor, Tensor | None]:
        shape, wide = (len(hidden),), projection.wide
        normaliser = hidden.new_empty(shape, dtype=wide)
        label_log_probs = hidden.new_empty(shape, dtype=wide)
        set_log_probs = None if outcomes is None else hidden.new_empty(shape, dtype=wide)
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in projection.chunks(hidden):
                for tile in chunk.tiles():
                    rows = slice(chunk.rows.start + tile.start, chunk.rows.start + tile.stop)
                    logits = projection.head.finish(chunk.logits[tile].to(wide))
                    normaliser[rows] = logits.logsumexp(-1)
                    label_log_probs[rows] = logits.gather(-1, labels[rows, None])[:, 0] - normaliser[rows]
                    if outcomes is not None and set_log_probs is not None:
                        inside = logits.masked_fill(~outcomes, -torch.inf).logsumexp(-1)
                        set_log_probs[rows] = (inside - normaliser[rows]).clamp(max=0)
        # Rounding may give a probability above one.
        label_log_probs.clamp_(max=0)
        ctx.projection = projection
        # The weights are saved only so that autograd notices a change of them before the backward pass.
        ctx.save_for_backward(hidden, weight, bias, labels, outcomes, normaliser, set_log_probs)
        return label_log_probs, set_log_probs

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_label: Tensor, grad_set: Tensor
    ) -> tuple[Tensor | None, ...]:
        projection: Projection = ctx.projection
        hidden, _, _, labels, outcomes, normaliser, set_log_probs = ctx.saved_tensors
        gradients = HeadGradients.zeros(projection, hidden, ctx.needs_input_grad[:3])
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in projection.chunks(hidden):
                for tile in chunk.tiles():
                    rows = slice(chunk.rows.start + tile.start, chunk.rows.start + tile.stop)
                    # What the head does after the product (softcap, scale) is differentiated by autograd, per tile.
                    leaf = chunk.logits[tile].to(projection.wide).requires_grad_()
                    with torch.enable_grad():
                        logits = projection.head.finish(leaf)
                    log_probs = logits.detach() - normaliser[rows, None]
                    if outcomes is None:
                        grad = _grad_logits(log_probs, labels[rows], grad_label[rows])
                    else:
                        grad = _grad_logits_and_set(
                            log_probs, labels[rows], grad_label[rows], outcomes, set_log_probs[rows], grad_set[rows]
                        )
                    chunk.logits[tile] = torch.autograd.grad(logits, leaf, grad)[0]
                gradients.accumulate(chunk)
        return *gradients.result(projection.head), None, None, None


def _grad_logits(log_probs: Tensor, labels: Tensor, grad_label: Tensor) -> Tensor:
    """d(grad_label * log p(label)) / d logits, which overwrites the log-probs."""
    return log_probs.exp_().mul_(-grad_label[:, None]).scatter_add_(-1, labels[:, None], grad_label[:, None])


def _grad_logits_and_set(
    log_probs: Tensor, labels: Tensor, grad_label: Tensor, outcomes: Tensor, set_log_probs: Tensor, grad_set: Tensor
) -> Tensor:
    """d(grad_label * log p(label) + grad_set * log p(set)) / d logits, which overwrites the log-probs.

    Inside the set, probabilities are conditional on the set, so that nothing is divided by a tiny p(set).
    """
    outside = -(grad_label + grad_set)
    inside = grad_set + outside * set_log_probs.exp()
    conditional = log_probs.sub_(outcomes * set_log_probs[:, None]).exp_()
    grad = conditional.mul_(torch.where(outcomes, inside[:, None], outside[:, None]))
    return grad.scatter_add_(-1, labels[:, None], grad_label[:, None])
