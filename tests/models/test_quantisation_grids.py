"""Grids of quantised weights: those of torchao and compressed-tensors; what is trained on is what is exported."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mmkd.errors import UserError
from mmkd.models.quantisation_grids import FORMATS, Grid

GOLDEN: dict[str, np.ndarray] = dict(np.load(Path(__file__).parents[1] / "golden" / "QUANTISATION_grids.npz"))


def _weight(dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    return (torch.randn(64, 128) * torch.rand(64, 1)).to(dtype)


@pytest.mark.parametrize("format", FORMATS)
def test_the_grid_is_that_of_compressed_tensors(format: str) -> None:
    weight, grid = torch.from_numpy(GOLDEN["weight"]), Grid.of(format)
    assert np.array_equal(grid.fake_quantised(weight).numpy(), GOLDEN[f"{format}_compressed_tensors"])
    scales = grid.quantise(weight).scales.float()
    scales = torch.exp2(scales - 127) if format == "mxfp4" else scales
    assert np.array_equal(scales.numpy(), GOLDEN[f"{format}_scales"])


@pytest.mark.parametrize("format", FORMATS)
def test_the_grid_is_that_of_torchao(format: str) -> None:
    weight, grid = torch.from_numpy(GOLDEN["weight"]), Grid.of(format)
    ours, theirs = grid.fake_quantised(weight), torch.from_numpy(GOLDEN[f"{format}_torchao"])
    tie = torch.zeros_like(weight, dtype=torch.bool)
    if format in ("int4", "int8"):
        # torchao multiplies by the reciprocal of the scale, so that ties can fall to the other side: here those of
        # the largest magnitude of a group, which is 7.5 or 127.5 steps.
        steps = (weight / grid.quantise(weight).scales.repeat_interleave(grid.group or 64, -1)).abs()
        tie = (steps - steps.floor() - 0.5).abs() < 1e-5
    torch.testing.assert_close(ours[~tie], theirs[~tie], rtol=3e-7, atol=1e-7)
    assert tie.float().mean() < 0.06


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_a_weight_is_trained_as_the_codes_that_are_exported(format: str, dtype: torch.dtype) -> None:
    weight, grid = _weight(dtype), Grid.of(format)
    quantised = grid.quantise(weight)
    fake = grid.fake_quantised(weight)
    assert fake.dtype == dtype
    assert torch.equal(grid.dequantise(quantised, dtype), fake)
    # Half a step at most, and a whole one where the largest magnitude is clamped.
    error = (fake.float() - weight.float()).norm() / weight.float().norm()
    assert error < {"int8": 0.02, "fp8": 0.04}.get(format, 0.15)
    assert len(fake.unflatten(-1, (-1, 16))[0, 0].unique()) <= (16 if "4" in format else 256)


@pytest.mark.parametrize("format", FORMATS)
def test_the_gradient_goes_straight_through(format: str) -> None:
    weight = _weight().requires_grad_()
    gradient = torch.randn(64, 128)
    Grid.of(format).fake_quantised(weight).backward(gradient)
    assert weight.grad is not None
    assert torch.equal(weight.grad, gradient)


def test_values_of_e2m1_and_scales_of_mxfp4_by_hand() -> None:
    grid = Grid.of("mxfp4")
    row = torch.zeros(32)
    row[:9] = torch.tensor([6.0, -0.25, 0.75, 1.25, 1.75, 2.5, -3.5, 5.0, -0.3])
    quantised = grid.quantise(row[None])
    # The largest, 6, is 1.5 times 4, so that the scale is 1.
    assert quantised.scales.tolist() == [[127]]
    assert grid.dequantise(quantised)[0, :9].tolist() == [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, -4.0, 4.0, -0.5]
    assert quantised.codes[0, :9].tolist() == [7, 8, 2, 2, 4, 4, 14, 6, 9]
    # 7 would be rounded to the next power of 2.
    row[0] = 7.0
    assert grid.quantise(row[None]).scales.tolist() == [[128]]


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_stay_zeros(format: str) -> None:
    grid, weight = Grid.of(format), torch.zeros(4, 64)
    assert torch.equal(grid.fake_quantised(weight), weight)
    assert torch.equal(grid.dequantise(grid.quantise(weight)), weight)


@pytest.mark.parametrize("format", ["int8", "fp8", "nvfp4"])
def test_tokens_are_quantised_each_by_itself(format: str) -> None:
    hidden = torch.randn(2, 5, 64) * torch.rand(2, 5, 1) * 10
    grid = Grid.of(format)
    whole = grid.fake_quantised_tokens(hidden)
    assert torch.equal(whole[1, 3], grid.fake_quantised_tokens(hidden[1, 3]))
    assert 0 < (whole - hidden).norm() / hidden.norm() < 0.15


def test_joined_tensors_of_nvfp4_share_a_scale() -> None:
    grid, (first, second) = Grid.of("nvfp4"), (_weight(), _weight() * 3)
    shared = grid.tensor_scale(first, second)
    assert shared is not None
    assert torch.equal(shared, grid.tensor_scale(torch.cat((first, second))))  # type: ignore[arg-type]
    joined = grid.fake_quantised(torch.cat((first, second)))
    assert torch.equal(joined[:64], grid.fake_quantised(first, shared))


def test_formats_and_groups_that_are_none_are_refused() -> None:
    with pytest.raises(UserError, match="'int3' is no format"):
        Grid.of("int3")
    with pytest.raises(UserError, match="nvfp4 has groups of 16"):
        Grid.of("nvfp4", 32)
    with pytest.raises(UserError, match=r"o_proj has 48 weights.*student_quantization_group"):
        Grid.of("int4").check((8, 48), "model.layer.o_proj")
    assert Grid.of("int4", 64).bits == 4.25
