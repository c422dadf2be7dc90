"""DHO's losses, search and teacher logits: the authors' numbers, and what holds for any numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmkd.losses.dual_head_losses import (
    ALPHAS,
    BETAS,
    distillation_loss,
    gradient_cosine,
    interpolate,
    search_interpolation,
    supervised_loss,
    tip_adapter_logits,
)
from mmkd.models.dual_head import CosineHead

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "DHO_losses.npz")


def golden(name: str) -> Tensor:
    return torch.tensor(GOLDEN[name])


def heads(variant: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Linear heads (train_others.py), or a linear and the authors' own cosine head (train_imgnet_semi.py)."""
    ce = torch.nn.Linear(16, 10)
    kd: Any = torch.nn.Linear(16, 10) if variant == "others" else CosineHead(16, 10, 0.01, dho_parity=True)
    with torch.no_grad():
        for head, name in ((ce, "ce"), (kd, "kd")):
            head.weight.copy_(golden(f"W_{name}"))
            head.bias.copy_(golden(f"b_{name}"))
    return ce, kd


@pytest.mark.parametrize("variant", ["others", "semi_vit"])
def test_losses_and_gradients_are_those_of_the_authors(variant: str) -> None:
    ce_head, kd_head = heads(variant)
    labeled, unlabeled = golden("feat_labeled").requires_grad_(), golden("feat_unlabeled").requires_grad_()
    ce_logits, kd_logits = ce_head(labeled), kd_head(labeled)
    ce = supervised_loss(ce_logits, golden("labels")).mean()
    kd_labeled = distillation_loss(kd_logits, golden("teacher_logits_labeled")).mean()
    kd_unlabeled = distillation_loss(kd_head(unlabeled), golden("teacher_logits_unlabeled")).mean()
    loss = 0.5 * ce + 0.5 * (kd_labeled + kd_unlabeled)
    # The script for ViTs adds the parts without weights: twice the loss at lambda 0.5.
    factor = 1 if variant == "others" else 2
    parts = {"ce_loss": ce, "distill_loss_labeled": kd_labeled, "distill_loss_unlabeled": kd_unlabeled}
    for name, value in {**parts, "loss": factor * loss}.items():
        assert value.item() == pytest.approx(GOLDEN[f"{variant}__{name}"].item(), rel=1e-5)
    torch.testing.assert_close(ce_logits, golden(f"{variant}__ce_logits_labeled"))
    torch.testing.assert_close(kd_logits, golden(f"{variant}__kd_logits_labeled"), rtol=1e-5, atol=1e-4)
    (factor * loss).backward()
    weights = {"W_ce": ce_head.weight, "W_kd": kd_head.weight, "feat_labeled": labeled, "feat_unlabeled": unlabeled}
    for name, tensor in weights.items():
        assert isinstance(tensor, Tensor)
        assert tensor.grad is not None
        torch.testing.assert_close(tensor.grad, golden(f"{variant}__grad_{name}"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["others", "semi_vit"])
def test_a_loss_has_no_gradient_at_all_in_the_other_head(variant: str) -> None:
    ce_head, kd_head = heads(variant)
    features = golden("feat_labeled")
    supervised_loss(ce_head(features), golden("labels")).mean().backward()
    assert all(parameter.grad is None for parameter in kd_head.parameters())
    ce_head.zero_grad(set_to_none=True)
    distillation_loss(kd_head(features), golden("teacher_logits_labeled")).mean().backward()
    assert all(parameter.grad is None for parameter in ce_head.parameters())


def test_search_finds_what_the_authors_found() -> None:
    found = search_interpolation(golden("eval_ce"), golden("eval_kd"), golden("eval_labels"))
    accuracy, alpha, beta = GOLDEN["eval_best"].tolist()
    assert (100 * found.accuracy, found.alpha, found.beta) == pytest.approx((accuracy, alpha, beta))
    grid = {(alpha, beta): value for alpha, beta, value in found.grid}
    for alpha, beta, value in GOLDEN["eval_grid"].tolist():
        assert 100 * grid[(round(alpha, 2), beta)] == pytest.approx(value)


def test_search_tries_beta_outside_and_keeps_the_first_of_equals() -> None:
    same = torch.eye(4)
    found = search_interpolation(same, same, torch.arange(4))
    assert (found.alpha, found.beta, found.accuracy) == (0, 0.5, 1)
    assert [point[:2] for point in found.grid] == [(alpha, beta) for beta in BETAS for alpha in ALPHAS]
    wrong = search_interpolation(same, same, (torch.arange(4) + 1) % 4)
    assert (wrong.alpha, wrong.beta, wrong.accuracy) == (0, 0.5, 0)


def test_search_needs_rows_and_values() -> None:
    logits, none = torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)
    with pytest.raises(ValueError, match="labelled rows"):
        search_interpolation(logits, logits, none)
    with pytest.raises(ValueError, match="at least one value"):
        search_interpolation(torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(1, dtype=torch.long), alphas=[])


def test_tip_adapter_is_that_of_the_authors() -> None:
    logits = tip_adapter_logits(
        golden("tip_feat"),
        golden("tip_clip_weights").T,
        golden("tip_adapter_weight"),
        golden("tip_cache_values"),
        GOLDEN["tip_alpha"].item(),
        GOLDEN["tip_beta"].item(),
    )
    torch.testing.assert_close(logits, golden("tip_logits"), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("alpha", [0, 0.3, 1])
@pytest.mark.parametrize("beta", [0.5, 1, 4])
def test_interpolation_is_the_log_of_the_mixture(alpha: float, beta: float) -> None:
    ce, kd = torch.randn(2, 5, 7, dtype=torch.float64).float()
    mixture = alpha * ce.softmax(-1) + (1 - alpha) * (kd / beta).softmax(-1)
    log_probs = interpolate(ce, kd, alpha, beta)
    torch.testing.assert_close(log_probs.exp(), mixture)
    # softmax gives the mixture back, which is what a pipeline applies.
    torch.testing.assert_close(log_probs.softmax(-1), mixture)


@pytest.mark.parametrize(
    ("alpha", "beta", "says"),
    [(-0.1, 1, "alpha is -0.1"), (1.5, 1, "alpha is 1.5"), (0.5, 0, "beta is 0"), (0.5, float("inf"), "beta is inf")],
)
def test_alpha_and_beta_out_of_range_are_refused(alpha: float, beta: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        interpolate(torch.zeros(1, 2), torch.zeros(1, 2), alpha, beta)
    with pytest.raises(ValueError, match=says):
        search_interpolation(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), [alpha], [beta])


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    logits = 100 * torch.randn(4, 6)
    torch.testing.assert_close(distillation_loss(logits, logits), torch.zeros(4))


def test_one_head_between_label_and_teacher_is_pulled_apart() -> None:
    """The gradients on one head's logits point against each other while p lies between y and the teacher."""
    logits = torch.tensor([[0.0, 0.0]]).requires_grad_()
    (ce,) = torch.autograd.grad(supervised_loss(logits, torch.tensor([0])).sum(), logits)
    (kd,) = torch.autograd.grad(distillation_loss(logits, torch.tensor([[-4.0, 4.0]])).sum(), logits)
    whole, rows = gradient_cosine(ce, kd)
    assert whole.item() == pytest.approx(-1)
    assert rows.tolist() == pytest.approx([-1])


def test_a_gradient_that_vanished_has_cosine_zero() -> None:
    whole, rows = gradient_cosine(torch.zeros(2, 3), torch.randn(2, 3))
    assert whole == 0
    assert not rows.any()
