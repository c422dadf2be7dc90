"""Plackett-Luce losses: the paper's listing, a plain reference of CPRD, and what holds for any numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mmkd.losses.list_ranking import cprd, plackett_luce, pld

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "SECONDARY_losses.npz")


def golden(name: str) -> Tensor:
    return torch.tensor(GOLDEN[name])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", ["1.0", "1.5", "4.0"])
def test_pld_is_that_of_the_papers_listing(temperature: str) -> None:
    student = golden("pld_student").requires_grad_()
    loss = pld(student, golden("pld_teacher"), golden("pld_labels"), float(temperature)).mean()
    loss.backward()
    assert loss.item() == pytest.approx(float(GOLDEN[f"pld_T{temperature}__loss"]), rel=1e-5)
    torch.testing.assert_close(student.grad, golden(f"pld_T{temperature}__grad"), rtol=1e-4, atol=1e-6)


def reference_cprd(scores: np.ndarray, teacher: np.ndarray, valid: np.ndarray) -> list[float]:
    """Pick after pick, in numpy."""
    losses = []
    for row in range(len(scores)):
        order = sorted(range(scores.shape[1]), key=lambda item: -teacher[row, item])
        loss = 0.0
        for position, item in enumerate(order):
            if not valid[row, item]:
                break
            left = [scores[row, other] for other in order[position:]]
            loss -= np.log(np.exp(scores[row, item]) / np.sum(np.exp(left)))
        losses.append(loss)
    return losses


def test_cprd_is_the_formula_and_pld_with_equal_weights_up_to_the_first_invalid_negative() -> None:
    scores, teacher = random(12, 6).requires_grad_(), random(12, 6, seed=1)
    valid = teacher > -0.4
    losses = cprd(scores, teacher, valid)
    expected = reference_cprd(scores.detach().numpy(), teacher.numpy(), valid.numpy())
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)
    ordered, order = teacher.sort(-1, descending=True)
    same = plackett_luce(scores.gather(-1, order), (ordered > -0.4).double())
    torch.testing.assert_close(losses, same)
    assert torch.autograd.gradcheck(lambda values: cprd(values, teacher, valid), scores)


def test_validity_ends_at_the_first_invalid_negative_even_where_a_later_is_valid() -> None:
    scores, teacher = random(1, 4), torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    with_gap = cprd(scores, teacher, torch.tensor([[True, False, True, True]]))
    torch.testing.assert_close(with_gap, cross_entropy(scores, torch.tensor([0])).reshape(1))
    assert cprd(scores, teacher, torch.tensor([[False, True, True, True]])).item() == 0


def test_items_that_are_no_candidates_change_nothing() -> None:
    scores, teacher = random(5, 4), random(5, 4, seed=1)
    absent = torch.full((5, 2), -torch.inf, dtype=torch.float64)
    wide = torch.cat([random(5, 2, seed=2), scores], 1).requires_grad_()
    losses = cprd(wide, torch.cat([absent, teacher], 1), torch.ones(5, 6, dtype=torch.bool))
    torch.testing.assert_close(losses, cprd(scores, teacher, torch.ones(5, 4, dtype=torch.bool)))
    losses.sum().backward()
    assert wide.grad is not None
    assert wide.grad.isfinite().all()
    assert (wide.grad[:, :2] == 0).all()
    nothing = cprd(wide, torch.full_like(wide, -torch.inf), torch.ones_like(wide, dtype=torch.bool))
    assert (nothing == 0).all()
    (gradient,) = torch.autograd.grad(nothing.sum(), wide)
    assert (gradient == 0).all()


def test_special_weights_are_cross_entropy_and_list_mle() -> None:
    scores = random(4, 7)
    first = torch.zeros(4, 7)
    first[:, 0] = 1
    torch.testing.assert_close(
        plackett_luce(scores, first), cross_entropy(scores, torch.zeros(4, dtype=torch.long), reduction="none")
    )
    likelihood = sum(scores[:, k:].log_softmax(-1)[:, 0] for k in range(7))
    torch.testing.assert_close(plackett_luce(scores, torch.ones(4, 7)), -torch.as_tensor(likelihood))


def test_adding_a_constant_to_the_scores_changes_nothing_and_the_right_order_is_best() -> None:
    scores = torch.arange(6.0, 0, -1).expand(2, 6)
    weights = torch.ones(2, 6)
    torch.testing.assert_close(plackett_luce(scores + 1e3, weights), plackett_luce(scores, weights))
    assert (plackett_luce(scores, weights) < plackett_luce(scores.flip(-1), weights)).all()
    assert plackett_luce(40 * scores, weights).max() < 1e-6


def test_equal_teacher_logits_are_ordered_by_class_number() -> None:
    student, labels = random(3, 5), torch.tensor([2, 0, 4])
    order = torch.tensor([[2, 0, 1, 3, 4], [0, 1, 2, 3, 4], [4, 0, 1, 2, 3]])
    expected = plackett_luce(student.gather(1, order), torch.full((3, 5), 0.2))
    torch.testing.assert_close(pld(student, torch.zeros(3, 5), labels, 2.0), expected)


def test_the_label_is_first_even_where_the_teacher_is_surest_of_another_class() -> None:
    teacher = torch.tensor([[9.0, -9.0, 0.0]])
    student = torch.tensor([[0.0, 5.0, 1.0]])
    weights = teacher.softmax(-1)[:, [1, 0, 2]]
    torch.testing.assert_close(pld(student, teacher, torch.tensor([1])), plackett_luce(student[:, [1, 0, 2]], weights))


def test_low_precision_is_computed_in_float32() -> None:
    student, teacher = (10 * random(4, 2000)).bfloat16(), random(4, 2000, seed=1)
    labels = torch.tensor([0, 5, 1999, 7])
    with torch.autocast("cpu", torch.bfloat16):
        low = pld(student, teacher.bfloat16(), labels)
    assert low.dtype == torch.float32
    exact = pld(student.double(), teacher.bfloat16().double(), labels)
    torch.testing.assert_close(low.double(), exact, rtol=1e-5, atol=1e-5)
