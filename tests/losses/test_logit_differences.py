"""BiLD against the authors' code, DBiLD by hand, and what both must keep."""

from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmkd.losses.divergences import Divergence, forward_kl, reverse_kl
from mmkd.losses.fused import fused_loss
from mmkd.losses.logit_differences import bild, dbild, head_sizes
from mmkd.models.heads import LMHead
from mmkd.teachers.signals import DenseSignal, ListedSignal, TopKSignal

GOLDEN: Any = np.load(Path(__file__).parents[1] / "golden" / "VISUAL_losses.npz")
DIVERGENCES: dict[str, Divergence] = {"bild": bild, "dbild": dbild, "bild of 3": partial(bild, top_k=3)}
each = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=list(DIVERGENCES))


def pair(*shape: int, seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return student.log_softmax(-1), teacher.log_softmax(-1)


def by_hand(student: Tensor, teacher: Tensor, heads: tuple[int, int], compare: Divergence) -> Tensor:
    """Both directions for one token, with the sizes of the teacher's head and of the student's given."""
    total = student.new_zeros(())
    for leader, size in zip((teacher, student), heads, strict=True):
        order = leader.argsort(descending=True)[:size].tolist()
        differences = [
            torch.stack([side[i] - side[j] for i, j in combinations(order, 2)]) for side in (student, teacher)
        ]
        total = total + compare(*(part.log_softmax(-1) for part in differences))
    return total


@pytest.mark.parametrize(("top_k", "temperature"), [(8, 3.0), (2, 1.0), (40, 0.5)])
def test_bild_is_that_of_the_authors_code(top_k: int, temperature: float) -> None:
    name = f"bild_{top_k}_{temperature}"
    logits = torch.from_numpy(GOLDEN["bild_student"]).requires_grad_()
    teacher = torch.from_numpy(GOLDEN["bild_teacher"])
    loss = bild((logits / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1), top_k)
    expected = GOLDEN[f"{name}_teacher_led"] + GOLDEN[f"{name}_student_led"]
    torch.testing.assert_close(loss.detach(), torch.from_numpy(expected))
    gradient = torch.autograd.grad(loss.sum(), logits)[0]
    torch.testing.assert_close(gradient, torch.from_numpy(GOLDEN[f"{name}__grad"]))


def test_dbild_is_the_reverse_kl_within_the_heads_up_to_their_knees() -> None:
    student, teacher = pair(50, seed=3)
    sizes = [int(head_sizes(side.exp().topk(32).values)) for side in (teacher, student)]
    assert sizes[0] != sizes[1]
    expected = by_hand(student, teacher, (sizes[0], sizes[1]), reverse_kl)
    torch.testing.assert_close(dbild(student, teacher), expected)
    # Tokens beside each other have heads of their own.
    others = pair(50, seed=4)
    both = dbild(torch.stack([student, others[0]]), torch.stack([teacher, others[1]]))
    torch.testing.assert_close(both, torch.stack([expected, dbild(*others)]))


@pytest.mark.parametrize(
    ("probs", "size"),
    [
        ([0.9, 0.05, 0.02, 0.01, 0.01, 0.01], 2),
        ([0.45, 0.43, 0.04, 0.04, 0.03, 0.01], 3),
        # Nothing bends in a flat or a straight curve.
        ([0.25, 0.25, 0.25, 0.25], 4),
        ([0.4, 0.3, 0.2, 0.1], 4),
        ([0.7, 0.3], 2),
        ([1.0], 1),
    ],
)
def test_a_head_ends_at_the_knee(probs: list[float], size: int) -> None:
    assert int(head_sizes(torch.tensor(probs))) == size


@each
def test_equal_distributions_have_no_loss_and_others_have(divergence: Divergence) -> None:
    student, teacher = pair(6, 20)
    torch.testing.assert_close(divergence(student, student), torch.zeros(6, dtype=torch.float64))
    assert (divergence(student, teacher) > 0).all()


@each
def test_gradients_are_right(divergence: Divergence) -> None:
    student, teacher = pair(3, 12)
    logits = student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: divergence(z.log_softmax(-1), teacher), logits)


@each
def test_a_shift_or_impossible_outcomes_do_no_harm(divergence: Divergence) -> None:
    student, teacher = pair(4, 12)
    torch.testing.assert_close(divergence(student + 3, teacher - 2), divergence(student, teacher))
    impossible = teacher.clone()
    impossible[:, 2:] = -torch.inf
    leaf = student.clone().requires_grad_()
    divergence(leaf, impossible.log_softmax(-1)).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert divergence(student[:0], teacher[:0]).shape == (0,)
    assert divergence(student[:, :1], teacher[:, :1]).tolist() == [0, 0, 0, 0]


@each
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_what_a_teacher_lists_is_compared_at_any_temperature(divergence: Divergence, temperature: float) -> None:
    """The teacher-led part is that of the whole distribution; with all tokens listed, everything is."""
    torch.manual_seed(0)
    hidden, head = torch.randn(5, 6, dtype=torch.float64), LMHead(torch.randn(30, 6, dtype=torch.float64))
    teacher = DenseSignal(torch.randn(5, 6, dtype=torch.float64), LMHead(torch.randn(30, 6, dtype=torch.float64)))
    labels = torch.zeros(5, dtype=torch.long)
    log_probs = teacher.head.log_probs(teacher.hidden)

    def loss(targets: Any) -> Tensor:
        return fused_loss(hidden, head, labels, targets, divergence, temperature=temperature, chunk_size=2).total

    def listed(k: int) -> ListedSignal:
        top, ids = log_probs.topk(k)
        return ListedSignal(TopKSignal(ids, top, (1 - top.exp().sum(-1)).clamp(min=1e-30).log()))

    torch.testing.assert_close(loss(listed(30)), loss(teacher))
    student = (head.log_probs(hidden) / temperature).log_softmax(-1)
    tempered = (log_probs / temperature).log_softmax(-1)
    ids = tempered.topk(9).indices
    inside = divergence(student.gather(-1, ids), tempered.gather(-1, ids)).sum()
    torch.testing.assert_close(loss(listed(9)), temperature**2 * inside)


def test_bild_of_two_outcomes_has_nothing_to_compare_but_the_order() -> None:
    """One pair alone has probability 1 on both sides."""
    student, teacher = pair(4, 2)
    assert bild(student, teacher).tolist() == [0, 0, 0, 0]
    assert (forward_kl(student, teacher) > 0).all()
