"""Teachers of other vocabularies: the numbers of ULD's authors and of DSKD, and the identities of both baselines."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mmkd.losses.divergences import forward_kl
from mmkd.losses.fused import FusedLoss, fused_loss
from mmkd.losses.other_vocabulary import MappedTargets, SortedTargets, uld
from mmkd.models.heads import LMHead
from mmkd.teachers.signals import DenseSignal

GOLDEN = Path(__file__).parents[1] / "golden"


def signal(logits: Tensor) -> DenseSignal:
    return DenseSignal(logits, LMHead(torch.eye(logits.shape[-1], dtype=logits.dtype)))


def fused_uld(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """The sum over positions of ULD between two models given by their logits."""
    head = LMHead(torch.eye(student.shape[-1], dtype=student.dtype))
    labels = torch.zeros(len(student), dtype=torch.long)
    loss = fused_loss(
        student, head, labels, SortedTargets(signal(teacher)), uld, temperature=temperature, chunk_size=3
    )
    return loss.total / temperature**2


def dense_uld(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = (x.softmax(-1).sort(-1, descending=True).values for x in (student, teacher))
    shared = min(student.shape[-1], teacher.shape[-1])
    rest = student[:, shared:].sum(-1) + teacher[:, shared:].sum(-1)
    return ((student[:, :shared] - teacher[:, :shared]).abs().sum(-1) + rest).sum()


def check_golden(name: str, loss: Tensor, student_logits: Tensor) -> None:
    golden = np.load(GOLDEN / "ALM_peers.npz")
    (gradient,) = torch.autograd.grad(loss, student_logits)
    np.testing.assert_allclose(loss.item(), golden[f"{name}__loss"], rtol=1e-5)
    np.testing.assert_allclose(gradient.numpy(), golden[f"{name}__grad"], rtol=1e-4, atol=1e-6)


def golden_case() -> dict[str, Tensor]:
    golden = {name: torch.tensor(values) for name, values in np.load(GOLDEN / "ALM_peers.npz").items()}
    golden["student_logits"].requires_grad_()
    return golden


def answers_of(golden: dict[str, Tensor], row: int, before: int = 0, skipped: int = 0) -> tuple[Tensor, Tensor]:
    """The logits at the supervised positions of one text, from `before` positions earlier on, cut to the shorter."""
    parts = []
    for side in ("student", "teacher"):
        supervised = golden[f"{side}_labels"][row] != -100
        begin = int(supervised.int().argmax()) - before
        parts.append(golden[f"{side}_logits"][row, begin : begin + int(supervised.sum()) - skipped])
    size = min(map(len, parts))
    return parts[0][:size], parts[1][:size]


@pytest.mark.parametrize(
    "name, temperature, weight, skipped", [("default", 1, 1, 0), ("skip_eos", 1, 1, 1), ("T2", 2, 1.5, 0)]
)
def test_loss_and_gradient_are_those_of_the_authors_of_uld(name, temperature, weight, skipped):
    golden = golden_case()
    # The authors begin at the last ignored position, which predicts the first answer token.
    texts = [answers_of(golden, row, before=1, skipped=skipped) for row in range(2)]
    means = [fused_uld(*text, temperature) / len(text[0]) for text in texts]
    check_golden(f"uld_{name}", weight * torch.stack(means).mean(), golden["student_logits"])


def test_loss_and_gradient_are_those_of_dskd_and_of_gold_by_position():
    golden = golden_case()
    texts = [answers_of(golden, row) for row in range(2)]
    check_golden(
        "gold_positional", torch.stack([fused_uld(*x) / len(x[0]) for x in texts]).mean(), golden["student_logits"]
    )
    # DSKD needs texts of equal length: it saw the first 9 positions of the teacher.
    golden |= {name: golden[name][:, :9] for name in ("teacher_logits", "teacher_labels")}
    texts = [answers_of(golden, row) for row in range(2)]
    check_golden("dskd_uld", torch.stack([fused_uld(*text) for text in texts]).sum(), golden["student_logits"])


@pytest.mark.parametrize("vocabularies", [(17, 13), (13, 17), (5, 5)])
def test_uld_is_that_of_sorted_and_padded_probabilities(vocabularies):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(7, size, generator=generator, dtype=torch.float64) for size in vocabularies)
    student.requires_grad_()
    ours, dense = fused_uld(student, teacher), dense_uld(student, teacher)
    torch.testing.assert_close(ours, dense)
    torch.testing.assert_close(torch.autograd.grad(ours, student), torch.autograd.grad(dense, student))


def test_uld_does_not_see_the_order_of_the_vocabulary():
    student = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    assert fused_uld(student, student.detach().flip(-1)).item() == pytest.approx(0, abs=1e-12)


def fused_mined(student: Tensor, teacher: Tensor, teacher_tokens: Tensor, diagnostics: bool = False) -> FusedLoss:
    head = LMHead(torch.eye(student.shape[-1], dtype=student.dtype))
    targets = MappedTargets(signal(teacher), teacher_tokens)
    labels = student.detach().argmax(-1)
    return fused_loss(student, head, labels, targets, chunk_size=3, diagnostics=diagnostics)


def test_a_teacher_with_a_shuffled_vocabulary_is_found_again():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    student.requires_grad_()
    order = torch.randperm(5, generator=generator)
    shuffled = torch.full((7, 8), -torch.inf, dtype=torch.float64)
    shuffled[:, order] = teacher
    logits = shuffled.clamp(min=-1e3)
    loss = fused_mined(student, logits, order, diagnostics=True)
    dense = forward_kl(student.log_softmax(-1), teacher.log_softmax(-1)).sum()
    torch.testing.assert_close(loss.total, dense)
    torch.testing.assert_close(torch.autograd.grad(loss.total, student), torch.autograd.grad(dense, student))
    assert loss.sums["top1_agreement"] == (student.argmax(-1) == teacher.argmax(-1)).sum()
    torch.testing.assert_close(loss.sums["kl"], dense.detach())


def test_student_tokens_that_share_a_teacher_token_share_its_probability():
    teacher = torch.tensor([[0.0, 0, 50]], dtype=torch.float64)
    student = torch.zeros(1, 4, dtype=torch.float64)
    # Three of four student tokens stand for the likely teacher token: log 4 - log 3.
    assert fused_mined(student, teacher, torch.tensor([2, 2, 1, 2])).total.item() == pytest.approx(math.log(4 / 3))


def test_a_token_of_the_teacher_that_nothing_stands_for_agrees_with_no_token():
    teacher, student = torch.tensor([[0.0, 9, 0]]), torch.zeros(1, 2)
    sums = fused_mined(student, teacher, torch.tensor([0, 2]), diagnostics=True).sums
    assert sums["top1_agreement"] == 0
