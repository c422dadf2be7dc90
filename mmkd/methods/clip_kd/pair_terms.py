"""The terms of a contrastive distillation: what student and teachers say of the pairs of all ranks, compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmkd.losses.contrastive_losses import (
    Similarities,
    Targets,
    affinity,
    clip,
    feature_mse,
    icl,
    logit_kl,
    sigmoid,
    similarities,
    unit,
)
from mmkd.models.pair_heads import PairHead
from mmkd.training.gathering import first_of, gathered

from .clip_config import ContrastiveKDConfig


@dataclass(frozen=True)
class PairFeatures:
    """Features of the pairs of this rank, as a model gives them: of images, or first texts, and of captions."""

    images: Float[Tensor, "pair width"]
    texts: Float[Tensor, "pair width"]

    @classmethod
    def joined(cls, parts: Sequence["PairFeatures"]) -> "PairFeatures":
        """Those of several parts of a batch."""
        return cls(torch.cat([part.images for part in parts]), torch.cat([part.texts for part in parts]))


@dataclass(frozen=True)
class PairFacts:
    """What is known of the pairs of this rank besides features."""

    numbers: Int[Tensor, "pair"]
    """A number for each caption; equal captions have the same."""
    rows: Int[Tensor, "pair"]
    """Where the pairs stand in the data."""
    captions: Sequence[str]

    @classmethod
    def joined(cls, parts: Sequence["PairFacts"]) -> "PairFacts":
        """Those of several parts of a batch."""
        captions = [caption for part in parts for caption in part.captions]
        numbers, rows = (torch.cat([getattr(part, name) for part in parts]) for name in ("numbers", "rows"))
        return cls(numbers, rows, captions)


@dataclass(frozen=True)
class PairView:
    """What a model says of the pairs: features of length 1 of this rank and of all, and their cosines."""

    images: Float[Tensor, "pair width"]
    texts: Float[Tensor, "pair width"]
    all_images: Float[Tensor, "all width"]
    all_texts: Float[Tensor, "all width"]
    cosines: Similarities

    @classmethod
    def of(cls, features: PairFeatures, everywhere: bool) -> "PairView":
        """The view of features among those `everywhere`, gathered with their gradient, or by themselves."""
        images, texts = unit(features.images), unit(features.texts)
        if not everywhere:
            return cls(images, texts, images, texts, similarities(images, texts))
        width, first = images.shape[1], first_of(len(images))
        all_images, all_texts = gathered(torch.cat([images, texts], 1)).split(width, 1)
        cosines = similarities(images, texts, all_images, all_texts, first)
        return cls(images, texts, all_images, all_texts, cosines)


@dataclass(frozen=True)
class StudentSays:
    """The student's part in every term."""

    features: PairFeatures
    view: PairView
    scale: Tensor
    bias: Tensor | None
    targets: Targets
    sigmoid: bool


@dataclass(frozen=True)
class TeacherSays:
    """A teacher's part in the terms of its own."""

    view: PairView
    scale: Tensor
    head: PairHead | None


def own_term(student: StudentSays) -> Float[Tensor, "pair"]:
    """The contrastive loss of the pairs themselves, CLIP's or SigLIP's."""
    if student.sigmoid:
        bias = 0.0 if student.bias is None else student.bias
        return sigmoid(student.view.cosines, student.scale, bias, student.targets)
    return clip(student.view.cosines, student.scale, student.targets)


def taught_terms(
    student: StudentSays, teacher: TeacherSays, weights: Mapping[str, float], args: ContrastiveKDConfig
) -> dict[str, Float[Tensor, "pair"]]:
    """Term -> its value for each pair of this rank, without weight; those of weight 0 are left out."""
    ours, theirs = student.view, teacher.view
    terms: dict[str, Tensor] = {}
    if weights["logit_kl"]:
        scales = student.scale, teacher.scale
        terms["logit_kl"] = logit_kl(ours.cosines, theirs.cosines, *scales, args.temperature)
    if weights["affinity"]:
        terms["affinity"] = affinity(ours.cosines, theirs.cosines, args.affinity_scale, args.affinity_scale)
    if not (weights["feature_mse"] or weights["icl"]):
        return terms
    head = teacher.head
    assert head is not None, "heads are made for these terms"
    images, texts = unit(head.images(student.features.images)), unit(head.texts(student.features.texts))
    if weights["feature_mse"]:
        terms["feature_mse"] = feature_mse(images, texts, theirs.images, theirs.texts)
    if weights["icl"]:
        first = ours.cosines.first
        terms["icl"] = icl(images, texts, theirs.all_images, theirs.all_texts, head.scale, first, student.targets)
    return terms


def retrieved(view: PairView) -> tuple[Tensor, int]:
    """How many of this rank's images have their own caption as the nearest of all, and of how many."""
    cosines = view.cosines
    return (cosines.images.detach().argmax(-1) == cosines.own).sum(), len(cosines.images)


def same_captions(facts: PairFacts, all_numbers: Int[Tensor, "all"]) -> Tensor:
    """How many of this rank's pairs share their caption with another one of the batch."""
    return ((facts.numbers[:, None] == all_numbers).sum(-1) > 1).sum()
