"""The distance of a term of `features` between the items of student and teacher."""

from collections.abc import Callable

import torch
from torch import Tensor

from mmkd.errors import UserError
from mmkd.losses import feature_losses
from mmkd.losses.token_matching import matched_by_image
from mmkd.losses.visual_relations import common_tokens, pooled

from .feature_items import FeatureItems
from .feature_terms import FeatureTerm

Project = Callable[[Tensor, int], Tensor]
"""(student's features, width of the teacher's) -> the student's features at that width."""


def distance(
    term: FeatureTerm, tokens: str, student: FeatureItems, teacher: FeatureItems, project: Project, where: str
) -> tuple[Tensor, int]:
    """The sum of a term over its items, and how many these are: tokens; images on visual ones; sequences related.

    Raises UserError where the two sides have other items, or features of other widths and no projector.
    """
    if len(student.sizes) != len(teacher.sizes):
        raise UserError(
            f"{where} compares {len(student.sizes)} images or sequences of the student with {len(teacher.sizes)} of "
            "the teacher. Give both as many images.",
            because="meaning",
        )
    if term.of_attention:
        return _attention(term, student, teacher, where)
    if not student.sizes:
        return student.features.float().sum() * 0, 0
    ours, theirs, sizes = _paired(term, tokens, student, teacher, project, where)
    if term.kind == "relation":
        values = feature_losses.relation(ours, theirs, sizes)
        return values.sum(), len(values)
    values = feature_losses.mse(ours, theirs) if term.kind == "mse" else feature_losses.cosine(ours, theirs)
    if tokens != "visual":
        return values.sum(), len(values)
    return torch.stack([image.mean() for image in values.split(sizes)]).sum(), len(sizes)


def _attention(term: FeatureTerm, student: FeatureItems, teacher: FeatureItems, where: str) -> tuple[Tensor, int]:
    ours, theirs = student.features, teacher.features
    if len(ours) != len(theirs) or ours.shape[-1] != theirs.shape[-1]:
        raise UserError(
            f"{where} compares what tokens attend to, and the teacher reads other tokens than the student. Remove "
            "teacher_view, or set another kind.",
            because="meaning",
        )
    if term.kind == "attention":
        values = feature_losses.attention(ours, theirs)
    else:
        total, entries = feature_losses.attention_mse(ours, theirs)
        # Each token counts the same, however many others it may attend to.
        values = total / entries.clamp(min=1)
    return values.sum(), len(values)


def _paired(
    term: FeatureTerm, tokens: str, student: FeatureItems, teacher: FeatureItems, project: Project, where: str
) -> tuple[Tensor, Tensor, list[int]]:
    """The features of items that belong together, the student's at the teacher's width where that matters."""
    ours, theirs, sizes = student.features, teacher.features, student.sizes
    differ = student.sizes != teacher.sizes
    if differ and (tokens != "visual" or term.visual_tokens == "same"):
        raise UserError(_other_number(term, tokens, student.sizes, teacher.sizes, where), because="meaning")
    if differ and term.visual_tokens == "pool":
        sizes = [common_tokens(*pair) for pair in zip(student.sizes, teacher.sizes, strict=True)]
        ours, theirs = pooled(ours, student.sizes, sizes), pooled(theirs, teacher.sizes, sizes)
    if term.kind != "relation":
        ours = project(ours, theirs.shape[-1])
    if differ and term.visual_tokens == "hungarian":
        sizes = [common_tokens(*pair) for pair in zip(student.sizes, teacher.sizes, strict=True)]
        pairs = matched_by_image(ours, student.sizes, theirs, teacher.sizes, "cosine")
        ours, theirs = ours[pairs[0]], theirs[pairs[1].to(theirs.device)]
    return ours, theirs, sizes


def _other_number(term: FeatureTerm, tokens: str, ours: list[int], theirs: list[int], where: str) -> str:
    if tokens == "visual":
        return (
            f"{where}: student and teacher cut images into different numbers of pieces ({ours[:4]} and {theirs[:4]}). "
            "Set visual_tokens: pool in the term to average the finer ones, or hungarian to pair those that are alike."
        )
    return (
        f"{where} compares all tokens, and the teacher reads other tokens than the student ({theirs[:4]} and "
        f"{ours[:4]}). Set tokens: answer."
    )
