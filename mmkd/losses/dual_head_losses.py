"""DHO (2505.07675): losses of a student with a supervised and a distillation head, and the combined prediction.

The outcomes are classes and an item is a row of data; the divergences are the same as for tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from mmkd.errors import UserError

from .divergences import forward_kl

ALPHAS = tuple(round(0.05 * step, 2) for step in range(21))
"""Weights of the supervised head that the authors try, in their order."""

BETAS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0)
"""Temperatures of the distillation head that the authors try, in their order."""


def distillation_loss(
    kd_logits: Float[Tensor, "row class"], teacher_logits: Float[Tensor, "row class"], temperature: float = 2.0
) -> Float[Tensor, "row"]:
    """temperature^2 KL(teacher || student) per row in nats, both softened by the temperature (eq. 6).

    The factor is in the authors' code but not in the paper. It makes the size of the gradient independent of the
    temperature.
    """
    student = (kd_logits.float() / temperature).log_softmax(-1)
    teacher = (teacher_logits.float() / temperature).log_softmax(-1)
    return temperature**2 * forward_kl(student, teacher)


def supervised_loss(ce_logits: Float[Tensor, "row class"], labels: Int[Tensor, "row"]) -> Float[Tensor, "row"]:
    """Cross-entropy per labelled row in nats."""
    return cross_entropy(ce_logits.float(), labels, reduction="none")


def interpolate(
    ce_logits: Float[Tensor, "*row class"], kd_logits: Float[Tensor, "*row class"], alpha: float, beta: float
) -> Float[Tensor, "*row class"]:
    """log of alpha softmax(ce) + (1 - alpha) softmax(kd / beta): the prediction of both heads, as log-probs.

    Raises UserError when alpha is outside [0, 1] or beta is not positive.
    """
    check_interpolation(alpha, beta)
    ce, kd = ce_logits.float().log_softmax(-1), (kd_logits.float() / beta).log_softmax(-1)
    # At the ends one weight is 0 and its log is -inf, which would make the gradient NaN.
    if alpha == 1:
        return ce
    if alpha == 0:
        return kd
    weight = ce.new_tensor([alpha, 1 - alpha]).log()
    return torch.logaddexp(ce + weight[0], kd + weight[1])


def check_interpolation(alpha: float, beta: float) -> None:
    """Raises UserError when alpha is outside [0, 1] or beta is not positive."""
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha is {alpha}; it is the weight of the supervised head and must lie between 0 and 1.")
    if not 0 < beta < float("inf"):
        raise UserError(f"beta is {beta}; it divides the distillation head's logits and must be a positive number.")


@dataclass(frozen=True)
class Interpolation:
    """The best alpha and beta of a grid, with the accuracy (0 to 1) of every pair that was tried."""

    alpha: float
    beta: float
    accuracy: float
    grid: tuple[tuple[float, float, float], ...]
    """(alpha, beta, accuracy), in the order of the search."""


def search_interpolation(
    ce_logits: Float[Tensor, "row class"],
    kd_logits: Float[Tensor, "row class"],
    labels: Int[Tensor, "row"],
    alphas: Sequence[float] = ALPHAS,
    betas: Sequence[float] = BETAS,
) -> Interpolation:
    """The pair with the highest accuracy on labelled rows; beta is the outer loop, and the first of equal pairs wins.

    The result is that of the authors' code, unless every pair predicts all rows wrongly: their code then returns (0,
    1) without having tried it, this function the first pair. Raises UserError for no rows, an empty grid, or values
    out of range.
    """
    if len(labels) == 0 or not alphas or not betas:
        raise UserError("alpha and beta are chosen by accuracy; pass labelled rows and at least one value of each.")
    ce = ce_logits.float().softmax(-1)
    grid: list[tuple[float, float, float]] = []
    for beta in betas:
        check_interpolation(alphas[0], beta)
        kd = (kd_logits.float() / beta).softmax(-1)
        for alpha in alphas:
            check_interpolation(alpha, beta)
            correct = (alpha * ce + (1 - alpha) * kd).argmax(-1) == labels
            grid.append((alpha, beta, correct.double().mean().item()))
    # max() keeps the first of equals.
    alpha, beta, accuracy = max(grid, key=lambda point: point[2])
    return Interpolation(alpha, beta, accuracy, tuple(grid))


def gradient_cosine(
    first: Float[Tensor, "row width"], second: Float[Tensor, "row width"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "row"]]:
    """Cosine of the gradients of two losses by the same features: of the whole batch, and per row; 0 for zeros."""
    rows = (normalize(first.float(), dim=-1) * normalize(second.float(), dim=-1)).sum(-1)
    whole = (normalize(first.float().flatten(), dim=0) * normalize(second.float().flatten(), dim=0)).sum()
    return whole, rows


def tip_adapter_logits(
    features: Float[Tensor, "row width"],
    text_weights: Float[Tensor, "class width"],
    keys: Float[Tensor, "example width"],
    values: Float[Tensor, "example class"],
    alpha: float,
    beta: float,
    logit_scale: float = 100.0,
) -> Float[Tensor, "row class"]:
    """Class logits of Tip-Adapter(-F) (2207.09519): scale f W + alpha exp(-(beta - beta f A^T)) V.

    Features, text weights and keys have unit length; values are one-hot labels of the few labelled examples.
    """
    affinity = features @ keys.T
    return logit_scale * features @ text_weights.T + alpha * torch.exp(beta * (affinity - 1)) @ values
