"""Losses over pairs of a batch: contrastive ones, and how a student's similarities learn from a teacher's.

Each gives a value per pair of this rank, to be averaged by the caller over the pairs of all ranks. Everything is
computed in fp32 or better under any autocast.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, logsigmoid, normalize, softmax

from .feature_losses import mse

SAME_CAPTION = ("negative", "positive", "ignore")
"""What two pairs of one caption are to each other."""


@dataclass(frozen=True)
class Similarities:
    """Cosines between the pairs of this rank and those of all ranks, in both directions."""

    images: Float[Tensor, "pair all"]
    """Of this rank's images with all texts."""
    texts: Float[Tensor, "pair all"]
    """Of this rank's texts with all images."""
    first: int = 0
    """The column of this rank's first pair; the others follow it."""

    @property
    def own(self) -> Int[Tensor, "pair"]:
        """The column of each pair itself."""
        return torch.arange(self.first, self.first + len(self.images), device=self.images.device)


@dataclass(frozen=True)
class Targets:
    """Which of all pairs belong to a pair of this rank."""

    positive: Bool[Tensor, "pair all"]
    ignored: Bool[Tensor, "pair all"] | None = None
    """Pairs that are neither right nor wrong."""
    only: Int[Tensor, "pair"] | None = None
    """The column of the only right one, where there is one only and none is ignored."""

    @classmethod
    def of(
        cls,
        similarities: Similarities,
        captions: Int[Tensor, "pair"] | None = None,
        all_captions: Int[Tensor, "all"] | None = None,
        same: str = "negative",
    ) -> "Targets":
        """Each pair itself; with numbers that stand for captions, those of the same caption as `same` says."""
        shape, own = similarities.images.shape, similarities.own
        itself = torch.zeros(shape, dtype=torch.bool, device=own.device)
        itself[torch.arange(shape[0], device=own.device), own] = True
        if captions is None or all_captions is None or same == "negative":
            return cls(itself, only=own)
        equal = captions[:, None] == all_captions
        return cls(equal) if same == "positive" else cls(itself, equal & ~itself)


def unit(features: Float[Tensor, "item width"]) -> Float[Tensor, "item width"]:
    """Features of length 1, in fp32 or better."""
    with torch.autocast(features.device.type, enabled=False):
        return normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def similarities(
    images: Float[Tensor, "pair width"],
    texts: Float[Tensor, "pair width"],
    all_images: Float[Tensor, "all width"] | None = None,
    all_texts: Float[Tensor, "all width"] | None = None,
    first: int = 0,
) -> Similarities:
    """The cosines of unit features; without those of other ranks, among the pairs themselves."""
    with torch.autocast(images.device.type, enabled=False):
        return Similarities(
            images @ (texts if all_texts is None else all_texts).T,
            texts @ (images if all_images is None else all_images).T,
            first,
        )


def clip(cosines: Similarities, scale: Tensor | float, targets: Targets) -> Float[Tensor, "pair"]:
    """Cross-entropy in nats, mean of both directions (CLIP, 2103.00020); several right columns share the mass."""
    return (_cross_entropy(scale * cosines.images, targets) + _cross_entropy(scale * cosines.texts, targets)) / 2


def sigmoid(
    cosines: Similarities, scale: Tensor | float, bias: Tensor | float, targets: Targets
) -> Float[Tensor, "pair"]:
    """The sum over all texts of -log p(the image and the text belong together, or not) (SigLIP, 2303.15343)."""
    logits = scale * cosines.images + bias
    losses = -logsigmoid(torch.where(targets.positive, logits, -logits))
    return (losses if targets.ignored is None else losses.masked_fill(targets.ignored, 0)).sum(-1)


def logit_kl(
    student: Similarities,
    teacher: Similarities,
    scale: Tensor | float,
    teacher_scale: Tensor | float,
    temperature: float = 1.0,
) -> Float[Tensor, "pair"]:
    """T^2 KL(teacher || student) in nats of which of all texts belongs to an image, and the other way round.

    The mean of both directions, as CRD of CLIP-KD (2307.12732) and open_clip have it, whose
    cross-entropy is larger by the teacher's entropy.
    """
    ours, theirs = scale / temperature, teacher_scale / temperature
    both = _kl(ours * student.images, theirs * teacher.images) + _kl(ours * student.texts, theirs * teacher.texts)
    return temperature**2 * both / 2


def affinity(
    student: Similarities, teacher: Similarities, scale: Tensor | float, teacher_scale: Tensor | float
) -> Float[Tensor, "pair"]:
    """Cross-entropy in nats of the student's affinities under the teacher's (TinyCLIP, 2309.12314)."""
    images = _soft_cross_entropy(scale * student.images, teacher_scale * teacher.images)
    return (images + _soft_cross_entropy(scale * student.texts, teacher_scale * teacher.texts)) / 2


def feature_mse(
    images: Float[Tensor, "pair width"],
    texts: Float[Tensor, "pair width"],
    teacher_images: Float[Tensor, "pair width"],
    teacher_texts: Float[Tensor, "pair width"],
) -> Float[Tensor, "pair"]:
    """Mean squared difference of unit features, of images and of texts added (FD of CLIP-KD, 2307.12732)."""
    return mse(images, teacher_images) + mse(texts, teacher_texts)


def icl(
    images: Float[Tensor, "pair width"],
    texts: Float[Tensor, "pair width"],
    teacher_images: Float[Tensor, "all width"],
    teacher_texts: Float[Tensor, "all width"],
    scale: Tensor | float,
    first: int = 0,
    targets: Targets | None = None,
) -> Float[Tensor, "pair"]:
    """Interactive contrastive learning: the student's images find the teacher's texts, and its texts the images.

    The mean of both directions (CLIP-KD, 2307.12732).
    """
    crossed = similarities(images, texts, teacher_images, teacher_texts, first)
    return clip(crossed, scale, Targets.of(crossed) if targets is None else targets)


def _cross_entropy(logits: Float[Tensor, "pair all"], targets: Targets) -> Float[Tensor, "pair"]:
    if targets.only is not None:
        # The same as below, with fewer copies of a matrix of all pairs.
        return cross_entropy(logits, targets.only, reduction="none")
    if targets.ignored is not None:
        logits = logits.masked_fill(targets.ignored, -torch.inf)
    # What is ignored has no probability, and -inf must not be multiplied by 0.
    log_probs = log_softmax(logits, dim=-1).masked_fill(~targets.positive, 0)
    return -log_probs.sum(-1) / targets.positive.sum(-1)


def _soft_cross_entropy(student: Float[Tensor, "pair all"], teacher: Float[Tensor, "pair all"]) -> Tensor:
    return -(softmax(teacher, dim=-1) * log_softmax(student, dim=-1)).sum(-1)


def _kl(student: Float[Tensor, "pair all"], teacher: Float[Tensor, "pair all"]) -> Float[Tensor, "pair"]:
    target = log_softmax(teacher, dim=-1)
    return (target.exp() * (target - log_softmax(student, dim=-1))).sum(-1)
