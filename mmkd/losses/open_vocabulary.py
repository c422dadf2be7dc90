"""Losses between a student's image embeddings and a vision-language model's images, class texts and captions.

Those of "Distilling Large Vision-Language Model with Out-of-Distribution Generalizability" (ICCV 2023, 2307.03135).
All of them compare directions: embeddings are divided by their lengths. Each gives one value per row.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from .divergences import forward_kl

TEMPERATURE = 0.07
"""What the authors divide cosines by."""

FEATURE_DISTANCES = ("normalized", "log")


def text_logits(
    embeds: Float[Tensor, "row width"], text: Float[Tensor, "class width"], temperature: float = TEMPERATURE
) -> Float[Tensor, "row class"]:
    """cos(embedding, text of the class) / temperature, in fp32: the prediction of a student without a class head."""
    return normalize(embeds.float(), dim=-1) @ normalize(text.float(), dim=-1).T / temperature


def alignment_loss(
    embeds: Float[Tensor, "row width"],
    images: Float[Tensor, "row width"],
    text: Float[Tensor, "class width"],
    top_k: int,
    temperature: float = TEMPERATURE,
) -> Float[Tensor, "row"]:
    """KL(teacher || student) in nats over the classes that are the teacher's `top_k` for the image (L-vlalign)."""
    teacher = text_logits(images, text, temperature)
    top = teacher.topk(min(top_k, len(text)), -1)
    student = text_logits(embeds, text, temperature).gather(-1, top.indices)
    return forward_kl(student.log_softmax(-1), top.values.log_softmax(-1))


def agreeing_rows(
    images: Float[Tensor, "row width"], text: Float[Tensor, "class width"], labels: Int[Tensor, "row"]
) -> Bool[Tensor, "row"]:
    """The rows whose label is known (not negative) and is the class that the teacher sees in the image."""
    return (text_logits(images, text).argmax(-1) == labels) & (labels >= 0)


def image_contrast(
    embeds: Float[Tensor, "row width"],
    images: Float[Tensor, "row width"],
    temperature: float = TEMPERATURE,
    both_ways: bool = True,
) -> Float[Tensor, "row"]:
    """Which of the batch's teacher features are those of the student's image, in nats (L-im-cst).

    With `both_ways`, the mean of that and of which image of the student teacher features are of.
    """
    similarity = text_logits(embeds, images, temperature)
    same = torch.arange(len(embeds), device=embeds.device)
    ours = cross_entropy(similarity, same, reduction="none")
    if not both_ways:
        return ours
    return (ours + cross_entropy(similarity.T, same, reduction="none")) / 2


def caption_loss(
    embeds: Float[Tensor, "row width"], captions: Float[Tensor, "row width"], labels: Int[Tensor, "row"]
) -> Float[Tensor, "row"]:
    """Which caption of the batch is the image's, in nats (L-cap); cosines are not divided by a temperature.

    Captions of other images of the same class are no wrong answers, nor are those that say the same.
    """
    similarity = text_logits(embeds, captions, 1.0)
    known = labels >= 0
    same = (labels[:, None] == labels[None]) & known[:, None]
    same |= (captions[:, None] == captions[None]).all(-1)
    same.fill_diagonal_(False)
    own = torch.arange(len(embeds), device=embeds.device)
    return cross_entropy(similarity.masked_fill(same, -1e7), own, reduction="none")


def feature_distance(
    embeds: Float[Tensor, "row width"], images: Float[Tensor, "row width"], form: str = "normalized"
) -> Float[Tensor, "row"]:
    """The squared distance of the student's embedding to the teacher's features (L-mse).

    normalized: of both divided by their lengths. log: of both as they are, whose batch mean the authors' alternative
    takes the logarithm of (`log_distance`).
    """
    if form == "normalized":
        embeds, images = normalize(embeds.float(), dim=-1), normalize(images.float(), dim=-1)
    return (embeds.float() - images.float()).square().sum(-1)


def log_distance(mean: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """log(1 + mean / 10) of the mean squared distance, the authors' alternative without normalisation."""
    return torch.log1p(mean / 10)
