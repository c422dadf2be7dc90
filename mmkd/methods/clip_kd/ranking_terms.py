"""Terms of clip_kd that learn how a teacher orders wrong answers: rankings, and losses on hard negatives."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmkd.losses.contrastive_losses import unit
from mmkd.losses.hard_negatives import (
    HardNegatives,
    difficulty,
    dynamic_weights,
    hard_contrastive,
    hard_feature_contrast,
    hard_kl,
    hardest,
    pair_features,
)
from mmkd.losses.list_ranking import cprd, pld
from mmkd.training.gathering import gathered

from .pair_terms import StudentSays, TeacherSays
from .ranking_config import RankingConfig

Cosines = Float[Tensor, "pair all"]


def ranked_terms(
    student: StudentSays,
    teacher: TeacherSays,
    same: Bool[Tensor, "pair all"],
    settings: RankingConfig,
    everywhere: bool,
) -> dict[str, Float[Tensor, "pair"]]:
    """Term -> its value for each pair of this rank, from the cosines of a teacher; only the terms that are set.

    `same` are the pairs of the same caption, itself included, which are never wrong answers.
    """
    terms: dict[str, Tensor] = {}
    if settings.ranking != "none" and not settings.has_scorer:
        least = -torch.inf if settings.ranking_min is None else settings.ranking_min
        values = []
        for ours, theirs in _directions(student, teacher):
            chosen = hardest(ours.detach(), same, settings.ranking_negatives)
            valid = chosen.of(theirs) >= least
            scored = Scored(chosen, teacher.scale * theirs.gather(-1, student.view.cosines.own[:, None])[:, 0])
            values.append(scored.loss(student, ours, teacher.scale * chosen.of(theirs), valid, settings))
        terms["ranking"] = torch.stack(values).mean(0)
    if settings.hard_negatives != "none":
        terms["hard_negatives"] = _hard_term(student, teacher, same, settings, everywhere)
    return terms


class Scored:
    """The order of one direction's wrong answers, which the student finds nearest."""

    def __init__(self, chosen: HardNegatives, positive: Float[Tensor, "pair"]):
        self.chosen, self.positive = chosen, positive

    def loss(
        self,
        student: StudentSays,
        cosines: Cosines,
        logits: Float[Tensor, "pair item"],
        valid: Bool[Tensor, "pair item"],
        settings: RankingConfig,
    ) -> Float[Tensor, "pair"]:
        """The ranking loss of each pair, from a teacher's logits of the wrong answers; -inf where there is none."""
        own = student.view.cosines.own
        scores = self.chosen.with_positive(student.scale * cosines, own)
        if settings.ranking == "cprd":
            return cprd(scores[:, 1:], logits, valid)
        teacher = torch.cat([self.positive[:, None], logits], -1)
        first = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
        return pld(scores, teacher, first, settings.ranking_temperature)


def _directions(student: StudentSays, teacher: TeacherSays) -> list[tuple[Cosines, Cosines]]:
    """The cosines of student and teacher, from images to texts and from texts to images."""
    ours, theirs = student.view.cosines, teacher.view.cosines
    return [(ours.images, theirs.images), (ours.texts, theirs.texts)]


def _hard_term(
    student: StudentSays,
    teacher: TeacherSays,
    same: Bool[Tensor, "pair all"],
    settings: RankingConfig,
    everywhere: bool,
) -> Float[Tensor, "pair"]:
    """The weighted losses on the wrong answers that the teacher finds nearest, mean of both directions."""
    own = student.view.cosines.own
    hard, rest = [], []
    for number, (ours, theirs) in enumerate(_directions(student, teacher)):
        chosen = hardest(theirs, same, settings.hard_negatives_count)
        hard.append(hard_contrastive(student.scale * ours, own, chosen))
        extra = torch.zeros_like(hard[-1])
        if settings.hard_kl_weight:
            logits = student.scale * ours, teacher.scale * theirs
            extra = extra + settings.hard_kl_weight * hard_kl(*logits, own, chosen)
        if settings.hard_contrast_weight:
            contrast = _feature_contrast(student, teacher, chosen, number == 0, settings.hard_temperature)
            extra = extra + settings.hard_contrast_weight * contrast
        rest.append(extra)
    loss = torch.stack(hard).mean(0)
    sizes = difficulty(loss.detach(), settings.hard_exponent)
    weights = dynamic_weights(loss.detach(), settings.hard_exponent, (gathered(sizes) if everywhere else sizes).mean())
    return weights * (loss + torch.stack(rest).mean(0))


def _feature_contrast(
    student: StudentSays, teacher: TeacherSays, chosen: HardNegatives, of_images: bool, temperature: float
) -> Float[Tensor, "pair"]:
    """The student's feature of each pair among the teacher's of the pair and of the wrong ones."""
    head, theirs = teacher.head, teacher.view
    assert head is not None, "heads are made for this term"
    images, texts = unit(head.images(student.features.images)), unit(head.texts(student.features.texts))
    own = student.view.cosines.own
    columns: Int[Tensor, "pair candidate"] = torch.cat([own[:, None], chosen.items], -1)
    if of_images:
        candidates = pair_features(theirs.images[:, None], theirs.all_texts[columns])
    else:
        candidates = pair_features(theirs.all_images[columns], theirs.texts[:, None])
    itself = torch.ones_like(chosen.present[:, :1])
    present = torch.cat([itself, chosen.present], -1)
    return hard_feature_contrast(pair_features(images, texts), candidates, present, temperature)
