"""Frequency terms and scales of features against the authors' code, and what they are meant to do."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mmkd.losses.grid_frequencies import band, frequency_loss
from mmkd.losses.standardisation import SCALINGS, Moments, equal_parts, scaling


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    arrays = np.load(Path(__file__).parents[1] / "golden" / "TOWER_terms.npz")
    return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def moments_of(features: Tensor) -> Moments:
    moments = Moments(features.shape[-1])
    for piece in features.split(64):
        moments.add(piece)
    return moments


def test_the_frequency_loss_is_scalekds(golden: dict[str, Tensor]) -> None:
    """Theirs transforms, takes out the direct component and transforms back; it is a sum over patches."""
    student = golden["student"].clone().requires_grad_()
    ours, theirs = (maps.permute(0, 2, 3, 1) for maps in (student, golden["teacher"]))
    loss = frequency_loss(ours, theirs).sum(-1).mean()
    assert loss.item() == pytest.approx(golden["frequency"].item(), rel=1e-4)
    gradient = torch.autograd.grad(loss, student)[0]
    assert torch.allclose(gradient, golden["frequency__grad"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("width", [8, 12, 36])
def test_phi_s_is_radios(width: int, golden: dict[str, Tensor]) -> None:
    """Up to the signs of eigenvectors and the choice of a Hadamard matrix, which leave variances what they are."""
    features = golden[f"phi_s_{width}"]
    mean, matrix = scaling(moments_of(features), "phi_s")
    assert torch.allclose(mean, golden[f"phi_s_{width}__mean"])
    theirs = golden[f"phi_s_{width}__matrix"]
    # The same scale, and the same distances between items.
    assert torch.allclose(matrix.T @ matrix, (theirs.T @ theirs).double(), rtol=1e-4, atol=1e-6)
    scaled = (features - mean) @ matrix.T
    assert torch.allclose(scaled.var(0), torch.ones(width, dtype=torch.float64), rtol=1e-6)
    own = equal_parts(width).abs()
    assert torch.allclose(own, golden[f"hadamard_{width}"].abs().double(), atol=1e-6)


@pytest.mark.parametrize("width", [1, 7, 192, 384, 768, 1152])
def test_equal_parts_are_orthogonal(width: int) -> None:
    matrix = equal_parts(width)
    assert torch.allclose(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), atol=1e-9)
    if width != 7:
        assert torch.allclose(matrix.abs(), torch.full_like(matrix, width**-0.5))


@pytest.mark.parametrize("kind", SCALINGS)
def test_scales(kind: str) -> None:
    features = torch.randn(300, 4, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1, 0.0]) + 2
    mean, matrix = scaling(moments_of(features), kind)
    scaled = (features - mean) @ matrix.T
    assert torch.isfinite(scaled).all()
    if kind == "none":
        assert torch.equal(scaled, features)
    else:
        expected = torch.tensor([1.0, 1.0, 1.0, 0.0 if kind == "channel" else 1.0], dtype=torch.float64)
        assert torch.allclose(scaled.var(0), expected, atol=1e-6)


def test_bands() -> None:
    grid = torch.randn(2, 6, 4, 3)
    assert torch.allclose(band(grid, "low", 1.0), grid, atol=1e-5)
    low = band(grid, "low", 0.01)
    assert torch.allclose(low, grid.mean((1, 2), keepdim=True).expand_as(grid), atol=1e-5)
    assert torch.allclose(band(grid, "all_but_mean", 0.5) + low, grid, atol=1e-5)
    half = band(grid, "low", 0.5)
    assert torch.allclose(band(half, "low", 0.5), half, atol=1e-5)


def test_a_patch_without_a_direction_has_no_say() -> None:
    """The middle of a map that was widened is its mean: without it only rounding errors are left."""
    student = torch.randn(1, 3, 3, 4)
    student[0, 1, 1] = (student.sum((1, 2)) - student[0, 1, 1])[0] / 8
    student.requires_grad_()
    loss = frequency_loss(student, torch.randn(1, 3, 3, 4))
    assert loss[0, 4].item() == pytest.approx(1, abs=1e-3)
    assert torch.isfinite(torch.autograd.grad(loss.sum(), student)[0]).all()
