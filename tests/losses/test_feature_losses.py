"""Distances between features: DistillKit's numbers, and what each distance must and must not depend on."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mmkd.losses.divergences import forward_kl
from mmkd.losses.feature_losses import attention, attention_mse, cosine, mse, relation

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "FEATURE_losses.npz")


SECONDARY = np.load(Path(__file__).parents[1] / "golden" / "SECONDARY_losses.npz")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", [mse, cosine])
def test_mean_over_layers_and_tokens_is_distillkits(kind: Callable[[Tensor, Tensor], Tensor]) -> None:
    student = torch.tensor(GOLDEN["student"]).requires_grad_()
    teacher, mask = torch.tensor(GOLDEN["teacher"]), torch.tensor(GOLDEN["mask"])
    weight = torch.tensor(GOLDEN["projections"]).requires_grad_()
    layers = [
        kind(torch.nn.functional.linear(student[ours][mask], weight[number]), teacher[theirs][mask]).mean()
        for number, (ours, theirs) in enumerate(GOLDEN["layers"].tolist())
    ]
    loss = torch.stack(layers).mean()
    loss.backward()
    name = kind.__name__
    # Theirs is summed in fp32.
    assert loss.item() == pytest.approx(float(GOLDEN[name]), rel=1e-6)
    for gradient, of in ((student.grad, "student"), (weight.grad, "projections")):
        torch.testing.assert_close(gradient, torch.tensor(GOLDEN[f"{name}__grad_{of}"]), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", [mse, cosine, lambda a, b: relation(a, b, [3, 4])])
def test_equal_features_have_no_distance_and_gradients_are_right(kind: Callable[[Tensor, Tensor], Tensor]) -> None:
    student, teacher = random(7, 5).requires_grad_(), random(7, 5, seed=1)
    torch.testing.assert_close(kind(teacher, teacher), torch.zeros_like(kind(student, teacher)), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda features: kind(features, teacher), student)


def test_relations_are_of_each_group_alone_and_of_any_width() -> None:
    student, teacher = random(7, 5), random(7, 3, seed=1)
    both = relation(student, teacher, [3, 4])
    apart = torch.cat([relation(student[:3], teacher[:3], [3]), relation(student[3:], teacher[3:], [4])])
    torch.testing.assert_close(both, apart)
    turned = student @ torch.linalg.qr(random(5, 5, seed=2)).Q
    raw = relation(student, teacher, [3, 4], normalized=False)
    torch.testing.assert_close(relation(turned, teacher, [3, 4], normalized=False), raw)
    assert relation(student[:0], teacher[:0], []).shape == (0,)


def bistil(name: str) -> Tensor:
    return torch.tensor(SECONDARY[f"bistil_{name}"])


def test_hidden_states_and_maps_of_every_layer_are_bistils() -> None:
    """Two layers of a student against every second of four, `src/sft/distil.py` of the authors."""
    maps, states = [], []
    for layer in range(2):
        names = (f"aS{layer}", f"aT{2 * layer + 1}")
        ours, theirs = (bistil(name).transpose(1, 2).flatten(0, 1) for name in names)
        total, entries = attention_mse(ours, theirs)
        assert (theirs == 0).any()
        maps.append(total.sum() / entries.sum())
    for layer in range(3):
        ours, theirs = (bistil(name).flatten(0, 1) for name in (f"hS{layer}", f"hT{2 * layer}"))
        states.append(mse(ours, theirs).mean())
    phase1 = torch.stack(maps).mean() + torch.stack(states).mean()
    assert phase1.item() == pytest.approx(float(SECONDARY["bistil_phase1__loss"]), rel=1e-6)
    # Their cross-entropy at T = 2 is the KL and the teacher's entropy, without the square of the temperature.
    learnt = bistil("labels") > -1
    teacher, student = (bistil(f"log{side}")[learnt].div(2).log_softmax(-1) for side in "TS")
    soft = (forward_kl(student, teacher) - (teacher.exp() * teacher).sum(-1)).mean()
    assert soft.item() == pytest.approx(float(SECONDARY["bistil_phase2_ce__loss"]), rel=1e-6)
    assert (phase1 + soft).item() == pytest.approx(float(SECONDARY["bistil_all__loss"]), rel=1e-6)


def test_attention_is_the_divergence_of_head_means_where_heads_differ() -> None:
    student, teacher = random(3, 4, 6).softmax(-1), random(3, 2, 6, seed=1).softmax(-1)
    ours, theirs = student.mean(1), teacher.mean(1)
    torch.testing.assert_close(attention(student, teacher), (theirs * (theirs / ours).log()).sum(-1))
    by_head = attention(student[:, :2], teacher)
    torch.testing.assert_close(by_head, (teacher * (teacher / student[:, :2]).log()).sum(-1).mean(-1))


def test_masked_keys_of_attention_have_finite_gradients() -> None:
    masked = torch.zeros(2, 1, 4).masked_fill(torch.tensor([False, False, True, True]), -torch.inf)
    scores = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    teacher = (random(2, 3, 4, seed=1).float() + masked).softmax(-1)
    loss = attention((scores + masked).softmax(-1), teacher).sum()
    (gradient,) = torch.autograd.grad(loss, scores)
    assert loss > 0
    assert gradient.isfinite().all()
    assert gradient[..., :2].abs().sum() > 0


def test_half_precision_is_computed_in_fp32_under_autocast() -> None:
    student, teacher = random(3, 64).bfloat16(), random(3, 64, seed=1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        for kind in (mse, cosine):
            assert kind(student, teacher).dtype == torch.float32
            torch.testing.assert_close(kind(student, teacher), kind(student.float(), teacher.float()))
