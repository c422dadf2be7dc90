"""RDist: the authors' numbers, the dense logits it never forms, and what it must not depend on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mmkd.losses.visual_relations import logit_metric, pooled, relation_distance, relation_loss, relations, tiles_of

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "LLAVAKD_losses.npz")


def golden_logits() -> tuple[Tensor, Tensor]:
    start, count = int(GOLDEN["image_start"]), int(GOLDEN["n_visual"])
    both = (torch.tensor(GOLDEN[name], dtype=torch.float32)[0] for name in ("student_logits", "teacher_logits"))
    student, teacher = (logits[start : start + count] for logits in both)
    return student.requires_grad_(), teacher


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: Tensor, normalized: bool) -> Tensor:
    """The distance of one image from logits in full."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if normalized:
        logits = logits - logits.mean(-1, keepdim=True)
        logits = logits / logits.norm(dim=-1, keepdim=True)
    return relation_distance(logits @ logits.T, teacher)


def test_raw_relation_of_logits_is_the_authors() -> None:
    student, teacher = golden_logits()
    loss = relation_loss(student, [728], relations(teacher, [728]))
    assert loss.item() == pytest.approx(float(GOLDEN["loss_rel"]), rel=1e-5)
    loss.backward()
    assert student.grad is not None
    assert student.grad.norm().item() == pytest.approx(float(GOLDEN["grad_rel_norm"]), rel=1e-4)
    expected = torch.tensor(GOLDEN["grad_rel_img_first8"])[0]
    torch.testing.assert_close(student.grad[:8], expected, rtol=1e-4, atol=1e-7)


def test_raw_relations_see_a_constant_that_the_softmax_ignores_and_normalised_ones_do_not() -> None:
    student, teacher = golden_logits()
    shifted = relation_loss(student + 10, [728], relations(teacher, [728]))
    assert shifted.item() == pytest.approx(float(GOLDEN["rel_const_shift"]), rel=1e-5)
    target = relations(teacher, [728], normalized=True)
    plain, moved = (relation_loss(logits, [728], target, normalized=True) for logits in (student, student + 10))
    assert moved.item() == pytest.approx(plain.item(), rel=1e-3)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_relation_of_logits_without_logits(monkeypatch: pytest.MonkeyPatch, normalized: bool, biased: bool) -> None:
    monkeypatch.setattr("mmkd.losses.visual_relations._ROWS", 7)
    hidden, weight = random(5, 4).requires_grad_(), random(23, 4, seed=1).requires_grad_()
    bias = random(23, seed=2).requires_grad_() if biased else None
    target = random(5, 5, seed=3)
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    expected = dense(hidden, weight, bias, target, normalized)
    gradients = torch.autograd.grad(expected, leaves)
    loss = relation_loss(hidden, [5], [target], weight=weight, bias=bias, normalized=normalized)
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(torch.autograd.grad(3 * loss, leaves), gradients, strict=True):
        torch.testing.assert_close(found, 3 * wanted)
    often = relation_loss(hidden, [5], [target], weight=weight, bias=bias, normalized=normalized, repeatable=True)
    for factor in (3, 2):
        again = torch.autograd.grad(factor * often, leaves, retain_graph=True)
        for found, wanted in zip(again, gradients, strict=True):
            torch.testing.assert_close(found, factor * wanted)


def test_metric_gives_the_products_of_logits() -> None:
    hidden, weight, bias = random(5, 4), random(23, 4, seed=1), random(23, seed=2)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    found = relations(hidden, [5], logit_metric(weight, bias))
    torch.testing.assert_close(found[0], logits @ logits.T)


def test_images_are_independent() -> None:
    hidden, teacher = random(9, 4).requires_grad_(), random(9, 6, seed=1)
    together = relation_loss(hidden, [4, 5], relations(teacher, [4, 5]))
    alone = [
        relation_loss(hidden[rows], [len(teacher[rows])], relations(teacher[rows], [len(teacher[rows])]))
        for rows in (slice(0, 4), slice(4, 9))
    ]
    torch.testing.assert_close(together, alone[0] + alone[1])


@pytest.mark.parametrize("normalized", [False, True])
def test_a_student_that_is_the_teacher_has_no_distance(normalized: bool) -> None:
    hidden, weight = random(6, 4), random(23, 4, seed=1)
    target = relations(hidden, [6], logit_metric(weight, centered=normalized), normalized=normalized)
    loss = relation_loss(hidden, [6], target, weight=weight, normalized=normalized)
    assert loss.item() == pytest.approx(0, abs=1e-12)


def test_no_image_is_a_zero_with_a_gradient() -> None:
    hidden = random(0, 4).requires_grad_()
    loss = relation_loss(hidden, [], [], weight=random(23, 4).requires_grad_())
    loss.backward()
    assert loss.item() == 0


def test_half_precision_does_not_overflow() -> None:
    hidden = (300 * random(6, 4)).half()
    with torch.autocast("cpu", torch.bfloat16):
        found = relations(hidden, [6])[0]
    assert found.dtype == torch.float32
    assert found.isfinite().all()


def test_without_gradients_the_value_is_the_same() -> None:
    hidden, weight, target = random(5, 4), random(23, 4, seed=1), random(5, 5, seed=3)
    with torch.no_grad():
        plain = relation_loss(hidden, [5], [target], weight=weight)
    loss = relation_loss(hidden.requires_grad_(), [5], [target], weight=weight)
    torch.testing.assert_close(plain, loss.detach())


def test_tiles_of_an_image_are_pooled_one_by_one() -> None:
    """An image of two tiles and one of three: 3 x 3 tokens become 2 x 2 in each of them."""
    assert tiles_of([8, 12], [4] * 5, [18, 27], [9] * 5) == ([4] * 5, [9] * 5)
    hidden = torch.randn(18, 3)
    halves = [pooled(half, [9], [4]) for half in hidden.split(9)]
    assert torch.equal(pooled(hidden, [9, 9], [4, 4]), torch.cat(halves))


def test_images_are_whole_where_their_tiles_do_not_belong_together() -> None:
    # Another number of tiles, tiles of which one side's are now larger and now smaller, and images side by side.
    assert tiles_of([8], [4, 4], [27], [9, 9, 9]) == ([8], [27])
    assert tiles_of([13], [4, 9], [14], [9, 5]) == ([13], [14])
    assert tiles_of([4, 4], [8], [9, 9], [18]) == ([4, 4], [9, 9])
    assert tiles_of([4, 8], [6, 6], [9, 9], [9, 9]) == ([4, 8], [9, 9])
