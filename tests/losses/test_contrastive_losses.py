"""Losses over pairs against TinyCLIP's, CLIP-KD's and open_clip's own code, and what must hold of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmkd.losses.contrastive_losses import (
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

FOLDER = Path(__file__).parents[1] / "golden"
TINY = np.load(FOLDER / "SECONDARY_losses.npz")
GOLDEN = np.load(FOLDER / "CONTRASTIVE_losses.npz")
SCALE, TEACHER_SCALE, BIAS = 14.0, 20.0, -3.0


def of(name: str, source: Any = GOLDEN) -> Tensor:
    return torch.as_tensor(source[name])


def projected(features: Tensor, side: str) -> Tensor:
    return unit(torch.nn.functional.linear(features, of(f"proj_{side}_weight"), of(f"proj_{side}_bias")))


def entropy(logits: Tensor) -> Tensor:
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


def golden_loss(name: str, student: list[Tensor]) -> Tensor:
    ours, theirs = [unit(each) for each in student], [unit(of("ti")), unit(of("tt"))]
    cosines, wanted = similarities(ours[0], ours[1]), similarities(theirs[0], theirs[1])
    targets = Targets.of(cosines)
    if name in ("clip", "clip_kd_task"):
        return clip(cosines, SCALE, targets).mean()
    if name == "siglip":
        return sigmoid(cosines, SCALE, BIAS, targets).mean()
    if name == "distill":
        both = entropy(TEACHER_SCALE * wanted.images) + entropy(TEACHER_SCALE * wanted.texts)
        return logit_kl(cosines, wanted, SCALE, TEACHER_SCALE).mean() + both / 2
    if name == "clip_kd_ckd":
        return logit_kl(cosines, wanted, SCALE, TEACHER_SCALE).mean()
    across = projected(student[0], "image"), projected(student[1], "text")
    if name == "clip_kd_fd":
        return feature_mse(across[0], across[1], theirs[0], theirs[1]).mean()
    return icl(across[0], across[1], theirs[0], theirs[1], float(of("clip_kd_cross_scale"))).mean()


NAMES = ("clip", "siglip", "distill", "clip_kd_task", "clip_kd_ckd", "clip_kd_icl", "clip_kd_fd")


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_are_those_of_the_authors(name: str) -> None:
    student = [of("si").clone().requires_grad_(), of("st").clone().requires_grad_()]
    loss = golden_loss(name, student)
    torch.testing.assert_close(loss, of(name), atol=1e-5, rtol=1e-5)
    for side, gradient in zip(("si", "st"), torch.autograd.grad(loss, student), strict=True):
        torch.testing.assert_close(gradient, of(f"{name}__grad_{side}"), atol=1e-5, rtol=1e-4)


def test_affinity_is_that_of_tinyclip() -> None:
    # Its inputs have length 1, and its gradients are by them.
    student = [of(f"tinyclip_{side}", TINY).clone().requires_grad_() for side in ("si", "st")]
    teacher = [of(f"tinyclip_{side}", TINY) for side in ("ti", "tt")]
    ours = similarities(student[0], student[1])
    scale = float(TINY["tinyclip_scale"])
    loss = affinity(ours, similarities(teacher[0], teacher[1]), scale, scale).mean()
    assert loss.item() == pytest.approx(float(TINY["tinyclip__loss"]), rel=1e-5)
    for side, gradient in zip(("si", "st"), torch.autograd.grad(loss, student), strict=True):
        torch.testing.assert_close(gradient, of(f"tinyclip__grad_{side}", TINY), atol=1e-5, rtol=1e-4)


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    cosines = similarities(unit(of("si")), unit(of("st")))
    assert logit_kl(cosines, cosines, SCALE, SCALE, 3.0).abs().max() < 1e-5
    assert feature_mse(*(unit(of(side)) for side in ("si", "st", "si", "st"))).abs().max() == 0


def test_the_rows_of_ranks_are_those_of_the_whole_batch() -> None:
    images, texts = unit(of("si")), unit(of("st"))
    whole = similarities(images, texts)
    for first in (0, 2, 4):
        part = slice(first, first + 2)
        own = similarities(images[part], texts[part], images, texts, first)
        for name, loss in (
            ("clip", lambda cosines: clip(cosines, SCALE, Targets.of(cosines))),
            ("sigmoid", lambda cosines: sigmoid(cosines, SCALE, BIAS, Targets.of(cosines))),
        ):
            torch.testing.assert_close(loss(own), loss(whole)[part], msg=name)


@pytest.mark.parametrize("same", ["positive", "ignore"])
def test_equal_captions_are_no_negatives(same: str) -> None:
    numbers = torch.tensor([1, 2, 1, 4, 5, 6])
    images, texts = unit(of("si")), unit(of("st"))[[0, 1, 0, 3, 4, 5]].clone().requires_grad_()
    cosines = similarities(images, texts)
    targets = Targets.of(cosines, numbers, numbers, same)
    plain = clip(cosines, SCALE, Targets.of(cosines))
    value = clip(cosines, SCALE, targets)
    assert value.isfinite().all()
    assert torch.equal(targets.positive.sum(1), torch.tensor([2, 1, 2, 1, 1, 1] if same == "positive" else [1] * 6))
    if same == "ignore":
        # Fewer columns compete.
        assert (value < plain)[[0, 2]].all()
        assert torch.autograd.grad(value.sum(), texts)[0].isfinite().all()
        pairs = sigmoid(cosines, SCALE, BIAS, targets)
        assert (pairs < sigmoid(cosines, SCALE, BIAS, Targets.of(cosines)))[[0, 2]].all()
    else:
        pairs = sigmoid(cosines, SCALE, BIAS, targets)
        assert (pairs != sigmoid(cosines, SCALE, BIAS, Targets.of(cosines)))[[0, 2]].all()
        halves = (SCALE * cosines.images)[0].log_softmax(-1)[[0, 2]].mean()
        back = (SCALE * cosines.texts)[0].log_softmax(-1)[[0, 2]].mean()
        assert value[0].item() == pytest.approx(-(halves + back).item() / 2, rel=1e-5)


def test_half_precision_is_computed_in_float32() -> None:
    images, texts = unit(of("si").bfloat16()), unit(of("st").bfloat16())
    assert images.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cosines = similarities(images, texts)
        assert clip(cosines, SCALE, Targets.of(cosines)).dtype == torch.float32
