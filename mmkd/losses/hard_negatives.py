"""Hard negatives that a teacher chooses, and losses on them: an inferred reading of DCD (2207.01426).

Of Dynamic Contrastive Distillation only the abstract and no code could be read. It says that the teacher selects hard
samples for a contrastive loss, and that samples are weighted by difficulty. The formulas here are the nearest reading:
which negatives, the temperatures, the weights of the terms and the form of the dynamic weight are **inferred**, and
numbers made with them are no reproduction of that paper. Pure functions, per row, in nats; computed in fp32 or better.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from mmkd.errors import UserError


@dataclass(frozen=True)
class HardNegatives:
    """The items that are hard for each row, hardest first."""

    items: Int[Tensor, "row item"]
    """Their columns. What stands where nothing is present is a column like any other, to be masked."""
    present: Bool[Tensor, "row item"]

    def of(self, values: Float[Tensor, "row column"]) -> Float[Tensor, "row item"]:
        """The values of these items; -inf where a row has fewer of them."""
        return values.gather(-1, self.items).masked_fill(~self.present, -torch.inf)

    def with_positive(
        self, values: Float[Tensor, "row column"], positives: Int[Tensor, "row"]
    ) -> Float[Tensor, "row candidate"]:
        """The values of the positive, which comes first, and of these items, in fp32 or better."""
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        return torch.cat([values.gather(-1, positives[:, None]), self.of(values)], -1)


@torch.no_grad()
def hardest(
    teacher_scores: Float[Tensor, "row column"], is_positive: Bool[Tensor, "row column"], count: int
) -> HardNegatives:
    """The `count` columns with the highest teacher scores that are not positives of a row.

    A row with several positives, such as equal captions in a batch, never gets any of them as its negative. Raises
    UserError where `count` is not positive.
    """
    if count < 1:
        raise UserError(f"The number of hard negatives is {count}; it must be 1 or more.")
    scores = teacher_scores.float().masked_fill(is_positive, -torch.inf)
    values, items = scores.sort(dim=-1, descending=True, stable=True)
    return HardNegatives(items[:, :count], values[:, :count] > -torch.inf)


def hard_contrastive(
    scores: Float[Tensor, "row column"], positives: Int[Tensor, "row"], negatives: HardNegatives
) -> Float[Tensor, "row"]:
    """L_hard: the cross-entropy of the positive among itself and the hard negatives; 0 for a row without any.

    `scores` are the student's, divided by its temperature. With all other columns as negatives this is InfoNCE.
    """
    return -negatives.with_positive(scores, positives).log_softmax(-1)[:, 0]


def hard_kl(
    scores: Float[Tensor, "row column"],
    teacher_scores: Float[Tensor, "row column"],
    positives: Int[Tensor, "row"],
    negatives: HardNegatives,
) -> Float[Tensor, "row"]:
    """L_kd: KL(teacher || student) over the positive and the hard negatives; both scores divided by temperatures."""
    student = negatives.with_positive(scores, positives).log_softmax(-1)
    teacher = negatives.with_positive(teacher_scores.detach(), positives).log_softmax(-1)
    # -inf minus -inf where an item is absent would be NaN.
    absent = teacher == -torch.inf
    return (teacher.exp() * (teacher.masked_fill(absent, 0) - student.masked_fill(absent, 0))).sum(-1)


def hard_feature_contrast(
    student: Float[Tensor, "row width"],
    teacher: Float[Tensor, "row candidate width"],
    present: Bool[Tensor, "row candidate"],
    temperature: float,
) -> Float[Tensor, "row"]:
    """L_cd: the student's feature of a pair against the teacher's of the same pair and of the hard ones.

    `teacher[:, 0]` is the same pair; both are compared by cosine over `temperature`.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    ours, theirs = normalize(student.to(dtype), dim=-1), normalize(teacher.detach().to(dtype), dim=-1)
    cosines = torch.einsum("rw,rcw->rc", ours, theirs) / temperature
    return -cosines.masked_fill(~present, -torch.inf).log_softmax(-1)[:, 0]


def pair_features(
    images: Float[Tensor, "*pair width"], texts: Float[Tensor, "*pair width"]
) -> Float[Tensor, "*pair width"]:
    """The feature of image and text together in a dual encoder, which fuses nothing: their product, whose sum is the
    cosine."""
    return normalize(images.float(), dim=-1) * normalize(texts.float(), dim=-1)


@torch.no_grad()
def difficulty(losses: Float[Tensor, "row"], exponent: float) -> Float[Tensor, "row"]:
    """The size of each row's weight before it is divided by the mean: its loss, to the power of `exponent`.

    0 weighs all rows equally, a positive exponent those more on which the student errs, a negative one those less.
    """
    if exponent == 0:
        return torch.ones_like(losses)
    # A loss of exactly 0 to a negative power would be infinite.
    return losses.clamp(min=torch.finfo(torch.float32).eps).pow(exponent)


@torch.no_grad()
def dynamic_weights(
    losses: Float[Tensor, "row"], exponent: float, mean: Float[Tensor, ""] | None = None
) -> Float[Tensor, "row"]:
    """w_i = l_i^exponent over its mean, without gradient: on average 1.

    `mean` is that of `difficulty` over a whole batch, where these rows are one rank's part of it.
    """
    sizes = difficulty(losses, exponent)
    return sizes / (sizes.mean() if mean is None else mean)
