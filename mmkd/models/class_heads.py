"""Heads and adapters of dual-head students besides plain linear ones."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from mmkd.errors import UserError

from .features import width_of


class CosineHead(nn.Module):
    """Class logits cos(features, weight of the class) / temperature (eq. 10).

    `dho_parity` reproduces the authors' code, for golden tests only: weights are not normalised, and a bias is divided
    by the temperature too.
    """

    def __init__(self, width: int, classes: int, temperature: float, dho_parity: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, width))
        self.bias = nn.Parameter(torch.zeros(classes)) if dho_parity else None
        self.temperature = temperature
        nn.init.normal_(self.weight)

    def forward(self, features: Float[Tensor, "row width"]) -> Float[Tensor, "row class"]:
        weight = self.weight if self.bias is not None else normalize(self.weight, dim=-1)
        return linear(normalize(features, dim=-1), weight, self.bias) / self.temperature


class EmbedHead(nn.Linear):
    """From the student's features to a vision-language model's space; begins as the identity where that can be."""

    def __init__(self, width: int, embed_width: int):
        super().__init__(width, embed_width, bias=False)

    def reset_parameters(self) -> None:
        """Begins anew."""
        if self.in_features == self.out_features:
            nn.init.eye_(self.weight)
        else:
            super().reset_parameters()


class ResidualAdapter(nn.Module):
    """SgVA-CLIP's visual adapter (2211.16191): relu(a W2 relu(W1 h) + (1 - a) h) of unit length, a being learnt.

    h are the features before the projection of a CLIP-like tower, found again from those after it by its
    pseudo-inverse, as the authors do. W1 is twice as wide as h.
    """

    inverse: Tensor

    def __init__(self, backbone: Any):
        super().__init__()
        projection = projection_of(backbone)
        given = width_of(backbone)
        self.width = given if projection is None else projection.shape[1]
        self.down = nn.Linear(self.width, 2 * self.width, bias=False)
        self.up = nn.Linear(2 * self.width, self.width, bias=False)
        self.share = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("inverse", torch.eye(self.width, given))

    def take(self, backbone: Any) -> None:
        """Takes the pseudo-inverse from a backbone with its weights."""
        projection = projection_of(backbone)
        if projection is not None and not projection.is_meta:
            self.inverse.copy_(torch.linalg.pinv(projection.detach().float()))

    def forward(self, features: Float[Tensor, "row given"]) -> Float[Tensor, "row width"]:
        before = linear(features, self.inverse.to(features.dtype))
        adapted = self.up(self.down(before).relu())
        return normalize((self.share * adapted + (1 - self.share) * before).relu(), dim=-1)


class TextHead(nn.Module):
    """Class logits of adapted features: through the tower's projection, times the texts of the classes, not learnt.

    As the authors', the projected features are not divided by their length again.
    """

    weight: Tensor
    projection: Tensor

    def __init__(self, backbone: Any, adapter: ResidualAdapter, classes: int, temperature: float):
        super().__init__()
        self.temperature = temperature
        self.register_buffer("projection", torch.eye(width_of(backbone), adapter.width))
        self.register_buffer("weight", torch.zeros(classes, width_of(backbone)))

    def take(self, backbone: Any, text: Float[Tensor, "class width"]) -> None:
        """Takes the projection of a backbone, and the texts. Raises UserError for texts of another space."""
        if text.shape != self.weight.shape:
            raise UserError(
                f"kd_head: adapter compares the tower's features of {self.weight.shape[1]} numbers with the teacher's "
                f"texts, which have {text.shape[1]}. Take the vision tower of that teacher as student.",
                because="meaning",
            )
        self.weight.copy_(normalize(text.float(), dim=-1))
        projection = projection_of(backbone)
        if projection is not None:
            self.projection.copy_(projection.detach())

    def forward(self, features: Float[Tensor, "row width"]) -> Float[Tensor, "row class"]:
        projected = linear(features, self.projection.to(features.dtype))
        return linear(projected, self.weight.to(features.dtype)) / self.temperature


def projection_of(backbone: Any) -> Tensor | None:
    """The weight of a tower's projection into the space of texts; None for a tower without."""
    projection = getattr(backbone, "visual_projection", None)
    return None if projection is None else projection.weight
