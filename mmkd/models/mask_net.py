"""MaskNet of MST-Distill (2507.07015): which channels of a teacher's layer suit a student, decided for each row."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

_HEADS = 3
_WIDEST = 48
"""Channels of the attention, at most: the first layer has width^2 times as many weights, where a teacher is wide."""


class MaskNet(nn.Module):
    """A mask between 0 and 1 for every channel of a layer, by attention between its channels.

    What is masked are vectors, feature maps (one mask per channel, made of their means over the places, each channel
    scaled on its own), or tokens (of their mean; the paper has none).
    """

    def __init__(self, width: int, of_map: bool = False):
        super().__init__()
        inner = max(_HEADS, min(_WIDEST, width // (2 * _HEADS) * _HEADS))
        self.embed = nn.Linear(width, inner * width)
        self.mha = nn.MultiheadAttention(inner, _HEADS, batch_first=True)
        self.fc = nn.Linear(inner, 1)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width) if of_map else None

    def mask(self, vectors: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
        """The mask of each row."""
        channels = self.embed(vectors).unflatten(-1, (vectors.shape[-1], -1))
        return self.fc(self.mha(channels, channels, channels, need_weights=False)[0])[..., 0].sigmoid()

    def forward(self, features: Tensor) -> Tensor:
        """Features of one of the three forms, masked."""
        given = features.to(self.fc.weight.dtype)
        if self.depthwise is not None:
            masked = given * self.mask(self.depthwise(given).mean((2, 3)))[:, :, None, None]
        elif given.ndim == 2:
            masked = given * self.mask(given)
        else:
            masked = given * self.mask(given.mean(1))[:, None]
        return masked.to(features.dtype)


def mask_net_for(features: Tensor) -> MaskNet | None:
    """The MaskNet for features like these; None for another form than those it knows."""
    if features.ndim not in (2, 3, 4):
        return None
    of_map = features.ndim == 4
    return MaskNet(features.shape[1 if of_map else -1], of_map).to(features.device)


def replaced_feature(output: Any, feature: Tensor, masked: Tensor) -> Any:
    """A module's output, in the form that it has, with another tensor in the place of its feature."""
    if output is feature:
        return masked
    if isinstance(output, Mapping):
        parts = {name: masked if part is feature else part for name, part in output.items()}
        return type(output)(**parts)
    return tuple(masked if part is feature else part for part in output)
