"""Weights of several losses: tokenkit's own numbers, and what balanced gradients are."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mmkd.losses.combine import COMBINATIONS, combination_weights, gradients_of, gradmag_weights

GOLDEN = Path(__file__).parents[1] / "golden"


def golden_gradients() -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    golden = dict(np.load(GOLDEN / "ALM_gradmag.npz"))
    return torch.tensor(np.concatenate([golden["grad_a"].reshape(3, -1), golden["grad_b"]], axis=1)), golden


def test_gradmag_weights_are_those_of_tokenkit():
    gradients, golden = golden_gradients()
    np.testing.assert_allclose(gradmag_weights(gradients), golden["approx_weights_preserve_mag"], rtol=1e-5)
    np.testing.assert_allclose(gradients.norm(dim=-1), golden["norm"], rtol=1e-5)


def test_weighted_gradients_point_as_tokenkits_and_have_one_length():
    gradients, golden = golden_gradients()
    weighted = gradmag_weights(gradients)[:, None] * gradients
    torch.testing.assert_close(weighted.norm(dim=-1), weighted.norm(dim=-1)[:1].expand(3))
    # tokenkit's gradmag has length 1, before the magnitude is preserved.
    unit = weighted / weighted.norm(dim=-1, keepdim=True)
    np.testing.assert_allclose(unit[:, -6:], golden["gradmag_b"], rtol=1e-4, atol=1e-6)


def test_a_loss_without_gradient_does_not_stop_the_others():
    assert gradmag_weights(torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]])).tolist() == pytest.approx(
        [0, 1 / 6, 5 / 6]
    )
    assert gradmag_weights(torch.zeros(2, 3)).tolist() == [0, 0]


def test_shares_are_the_lengths_of_the_weighted_gradients_and_their_sum_that_of_the_weights():
    gradients = torch.tensor([[3.0, 4.0], [0.0, 100.0], [0.5, 0.0]])
    weights = gradmag_weights(gradients, [1.0, 0.5, 2.0])
    lengths = (weights[:, None] * gradients).norm(dim=-1)
    assert (lengths / lengths[0]).tolist() == pytest.approx([1, 0.5, 2])
    assert weights.sum().item() == pytest.approx(3.5)


def test_shares_are_the_weights_where_gradients_are_of_one_length():
    gradients = torch.tensor([[0.0, 2.0], [2.0, 0.0], [0.0, 0.0]])
    # The share of a loss without gradient goes to no other.
    assert gradmag_weights(gradients, [1.0, 0.5, 2.0]).tolist() == pytest.approx([1, 0.5, 0])


def test_without_shares_all_are_equal():
    gradients = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gradmag_weights(gradients), gradmag_weights(gradients, [1 / 3] * 3))


def test_norms_of_gradients_in_bf16_are_taken_in_fp32():
    gradients = torch.full((2, 100_000), 1e-3, dtype=torch.bfloat16)
    weights = gradmag_weights(gradients)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx([0.5, 0.5])


def test_gradients_are_those_of_each_loss_and_the_graph_stays():
    first, second = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    losses = [(2 * first).sum(), (first * 3).sum() + second.square().sum()]
    gradients = gradients_of(losses, [first, second])
    assert gradients.tolist() == [[2, 2, 0, 0, 0], [3, 3, 2, 2, 2]]
    torch.stack(losses).sum().backward()
    assert first.grad is not None


def test_combinations_give_a_factor_per_loss():
    names = ["chunk", "token"]
    assert combination_weights("sum", names) == {"chunk": 1, "token": 1}
    assert combination_weights("weights", names, {"token": 3, "chunk": 2}) == {"chunk": 2, "token": 3}
    balanced = combination_weights("gradmag", names, gradients=torch.tensor([[1.0], [-3.0]]))
    assert {name: float(weight) for name, weight in balanced.items()} == pytest.approx({"chunk": 0.75, "token": 0.25})
    shared = combination_weights("gradmag", names, {"token": 3, "chunk": 1}, torch.tensor([[1.0], [-3.0]]))
    assert {name: float(weight) for name, weight in shared.items()} == pytest.approx({"chunk": 2, "token": 2})


def test_unknown_combinations_and_wrong_weights_are_refused():
    with pytest.raises(ValueError, match=f"'mean' is unknown; choose one of {', '.join(COMBINATIONS)}"):
        combination_weights("mean", ["a"])
    with pytest.raises(ValueError, match="sum does not use weights"):
        combination_weights("sum", ["a"], {"a": 1})
    with pytest.raises(ValueError, match="Combination weights needs a weight for each of a"):
        combination_weights("weights", ["a"])
    with pytest.raises(ValueError, match="There are weights for b, but the losses are a"):
        combination_weights("weights", ["a"], {"b": 1})
