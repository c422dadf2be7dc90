"""Losses of a classifier's further teaching: the authors' numbers, and what holds for any numbers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mmkd.losses import open_vocabulary as words
from mmkd.losses.class_objectives import aspect_loss, class_objective, ofa_loss, ranking_loss
from mmkd.losses.dual_head_losses import distillation_loss
from mmkd.losses.gated_teachers import balance_loss, blended_logits, chosen_teachers, gated_loss, teacher_losses

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "SECONDARY_losses.npz")


def golden(name: str) -> Tensor:
    return torch.tensor(GOLDEN[name])


def agrees(name: str, loss: Tensor, by: Tensor) -> None:
    """The loss is the authors', and so is its gradient."""
    assert loss.item() == pytest.approx(GOLDEN[f"{name}__loss"].item(), rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, by)[0], golden(f"{name}__grad"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("epsilon", [1.0, 1.1, 1.5])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_ofa_is_that_of_the_authors(epsilon: float, temperature: float) -> None:
    student = golden("pld_student").requires_grad_()
    loss = ofa_loss(student, golden("pld_teacher"), golden("pld_labels"), temperature, epsilon).mean()
    agrees(f"ofa_eps{epsilon}_T{temperature}", loss, student)


@pytest.mark.parametrize("temperature", [1.0, 1.5, 4.0])
def test_pld_is_that_of_the_authors(temperature: float) -> None:
    student = golden("pld_student").requires_grad_()
    loss = ranking_loss(student, golden("pld_teacher"), golden("pld_labels"), temperature).mean()
    agrees(f"pld_T{temperature}", loss, student)


def test_rows_without_a_label_have_a_loss() -> None:
    student, teacher, labels = golden("pld_student"), golden("pld_teacher"), golden("pld_labels")
    hidden = torch.full_like(labels, -100)
    cross = -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(ofa_loss(student, teacher, hidden), cross)
    torch.testing.assert_close(ofa_loss(student, teacher, labels), cross)
    top = ranking_loss(student, teacher, teacher.argmax(-1))
    torch.testing.assert_close(ranking_loss(student, teacher, hidden), top)


def test_ofa_survives_probabilities_of_zero() -> None:
    student = torch.tensor([[2000.0, 0.0]], requires_grad=True)
    loss = ofa_loss(student, torch.tensor([[5000.0, 0.0]]), torch.tensor([0]), epsilon=1.5).sum()
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_each_name_of_an_objective_is_its_loss() -> None:
    student, teacher, labels = golden("pld_student"), golden("pld_teacher"), golden("pld_labels")
    rows = {kind: class_objective(kind, 1.0, 1.5)(student, teacher, labels) for kind in ("kl", "ofa", "pld")}
    kl = torch.nn.functional.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    torch.testing.assert_close(rows["kl"].mean(), kl)
    torch.testing.assert_close(rows["ofa"], ofa_loss(student, teacher, labels, 1.0, 1.5))
    torch.testing.assert_close(rows["pld"], ranking_loss(student, teacher, labels))


def test_makd_is_that_of_the_authors() -> None:
    logits = golden("makd_logits").requires_grad_()
    classes = logits[:, :-6]
    loss = cross_entropy(classes, golden("makd_labels"))
    loss = loss + 4 * aspect_loss(logits[:, -6:], golden("makd_targets")).mean()
    agrees("makd", loss, logits)


OOD: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "cls": lambda s, t, w, c, y: 0 * s.sum(),
    "vlalign4": lambda s, t, w, c, y: words.alignment_loss(s, t, w, 4).mean(),
    "vlalign4_filter": lambda s, t, w, c, y: words.alignment_loss(s, t, w, 4)[words.agreeing_rows(t, w, y)].mean(),
    "cap": lambda s, t, w, c, y: words.caption_loss(s, c, y).mean(),
    "mse": lambda s, t, w, c, y: words.feature_distance(s, t).mean(),
    "mse_unnorm": lambda s, t, w, c, y: words.log_distance(words.feature_distance(s, t, "log").mean()),
    "cst_bi": lambda s, t, w, c, y: words.image_contrast(s, t).mean(),
    "cst_single": lambda s, t, w, c, y: words.image_contrast(s, t, both_ways=False).mean(),
}


@pytest.mark.parametrize("name", OOD)
def test_terms_of_the_open_vocabulary_are_those_of_the_authors(name: str) -> None:
    student, (teacher, text, captions) = (
        golden("ood_student").requires_grad_(),
        map(golden, ("ood_teacher", "ood_text", "ood_caption")),
    )
    labels = golden("ood_targets")
    cls = cross_entropy(words.text_logits(student, text), labels)
    agrees(f"ood_{name}", cls + OOD[name](student, teacher, text, captions, labels), student)


def test_alignment_alone_and_all_terms_are_those_of_the_authors() -> None:
    student, teacher, text = golden("ood_student").requires_grad_(), golden("ood_teacher"), golden("ood_text")
    labels = golden("ood_targets")
    aligned = words.alignment_loss(student, teacher, text, 4).mean()
    agrees("ood_vlalign4_only", aligned, student)
    # All classes, which are fewer than the authors' 256, of the images that the teacher gets right; no captions.
    aligned = words.alignment_loss(student, teacher, text, 256)[words.agreeing_rows(teacher, text, labels)].mean()
    total = cross_entropy(words.text_logits(student, text), labels) + aligned
    total = total + words.feature_distance(student, teacher).mean() + words.image_contrast(student, teacher).mean()
    agrees("ood_full", total, student)


def test_captions_of_the_same_class_or_of_the_same_words_are_no_wrong_answers() -> None:
    student, captions = golden("ood_student"), golden("ood_caption")
    same_class = words.caption_loss(student[:2], captions[:2], torch.tensor([4, 4]))
    torch.testing.assert_close(same_class, torch.zeros(2))
    same_words = words.caption_loss(student[:2], captions[[0, 0]], torch.tensor([-100, -100]))
    torch.testing.assert_close(same_words, torch.zeros(2))
    unknown = words.caption_loss(student[:2], captions[:2], torch.tensor([-100, -100]))
    assert (unknown > 0.1).all()


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_mst_as_published_is_that_of_the_authors(top_k: int) -> None:
    student = golden("mst_student").requires_grad_()
    gate = golden("mst_gate_logits").requires_grad_()
    losses = teacher_losses(student, golden("mst_teachers").transpose(0, 1))
    assert torch.equal(chosen_teachers(gate, top_k), golden(f"mst_k{top_k}__idx"))
    loss = gated_loss(losses, gate, top_k, published=True).mean()
    # The defect of the published form: its gate learns nothing from the teachers.
    assert torch.autograd.grad(loss, gate, retain_graph=True, allow_unused=True) == (None,)
    agrees(f"mst_k{top_k}", loss, student)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_gate_learns_which_teachers_are_easiest_to_follow(top_k: int) -> None:
    student, gate = golden("mst_student"), golden("mst_gate_logits").requires_grad_()
    losses = teacher_losses(student, golden("mst_teachers").transpose(0, 1))
    loss = gated_loss(losses, gate, top_k)
    if top_k == 1:
        torch.testing.assert_close(loss, losses.gather(-1, chosen_teachers(gate, 1)).squeeze(-1))
    (gradient,) = torch.autograd.grad(loss.sum(), gate)
    rows = torch.arange(len(gate))
    assert (gradient[rows, losses.argmin(-1)] < 0).all()
    assert (gradient[rows, losses.argmax(-1)] > 0).all()
    if top_k == 4:
        expected = (gate.softmax(-1) * losses).sum(-1)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), gate)[0])


def test_blended_teachers_are_those_of_the_authors_and_teach_the_gate() -> None:
    student, gate = golden("mst_student"), golden("mst_gate_logits").requires_grad_()
    blended = blended_logits(golden("mst_teachers").transpose(0, 1), gate)
    loss = distillation_loss(student, blended, 4.0).mean()
    assert loss.item() == pytest.approx(GOLDEN["mst_weighted__loss"].item(), rel=1e-5)
    assert torch.autograd.grad(loss, gate)[0].abs().sum() > 0


@pytest.mark.parametrize("kind", ["KL", "CV"])
def test_the_balance_of_teachers_is_that_of_the_authors(kind: str) -> None:
    gate = golden("mst_gate_logits").requires_grad_()
    agrees(f"mst_lb_{kind}", balance_loss(gate.softmax(-1).mean(0), kind.lower()), gate)
