"""Spatial frequencies of feature maps: ScaleKD's view of a teacher without what all its patches share (2411.06786)."""

import math
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

BANDS = ("all_but_mean", "low")
"""Which frequencies of a feature map are compared."""

_SHORTEST = 1e-3
"""Below this share of the usual length in an image, a direction is noise."""


def band(
    grid: Float[Tensor, "image height width channel"], kind: str, share: float
) -> Float[Tensor, "image height width channel"]:
    """The part of each channel's map that lies in a band of the discrete cosine transform (DCT-II).

    all_but_mean leaves out the direct component, which is the mean over the patches. low keeps the lowest `share` of
    the frequencies along each side, the mean among them.
    """
    if kind == "all_but_mean":
        return grid - grid.mean((1, 2), keepdim=True)
    height, width = (_lowest(size, share).to(grid) for size in grid.shape[1:3])
    return torch.einsum("ph,nhwc,qw->npqc", height, grid, width)


def frequency_loss(
    student: Float[Tensor, "image height width channel"],
    teacher: Float[Tensor, "image height width channel"],
    kind: str = "all_but_mean",
    share: float = 0.5,
) -> Float[Tensor, "image patch"]:
    """The squared distance of the band's features, each scaled to length 1, for each patch; from 0 to 4.

    ScaleKD's frequency loss is its sum over the patches of an image, with all_but_mean.
    """
    ours, theirs = (_unit(band(side.float(), kind, share).flatten(1, 2)) for side in (student, teacher))
    return (ours - theirs).square().sum(-1)


def _unit(features: Float[Tensor, "image patch channel"]) -> Float[Tensor, "image patch channel"]:
    """The features with length 1; those of a patch that is the mean of its image, all but rounding errors, near 0."""
    usual = features.detach().square().sum(-1).mean(1).sqrt()[:, None, None]
    tiny = torch.finfo(features.dtype).tiny
    shortest = (_SHORTEST * usual).clamp(min=tiny)
    return features / features.square().sum(-1, keepdim=True).clamp(min=tiny).sqrt().maximum(shortest)


@lru_cache(maxsize=32)
def _lowest(size: int, share: float) -> Float[Tensor, "place place"]:
    """The projection of a row of a map onto its lowest frequencies, at least one."""
    kept = max(1, round(share * size))
    places = torch.arange(size, dtype=torch.float64) + 0.5
    basis = torch.cos(math.pi / size * torch.arange(kept, dtype=torch.float64)[:, None] * places)
    basis = basis / basis.square().sum(1, keepdim=True).sqrt()
    return basis.T @ basis
