"""What a distilled tower has during its training only: a head into the space of each teacher, and its scale."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmkd.losses.standardisation import Moments, scaling
from mmkd.seams.transformers_seam import leave_out_of_saves

from .vision_towers import TowerView, look

Reader = Callable[[TowerView], Any]
"""What is made of a tower's view of images, inside its forward."""

HEADS = "distillation_heads"
"""The name of the heads in the tower that is trained."""


@dataclass(frozen=True)
class Widths:
    """Channels of what a tower says."""

    patches: int
    summary: int

    @classmethod
    def of(cls, view: TowerView) -> "Widths":
        """Those of a view."""
        return cls(view.patches.shape[-1], view.summary.shape[-1])


class Scale(nn.Module):
    """The standardisation of one kind of features of a teacher; saved in checkpoints, and never trained."""

    mean: Tensor
    matrix: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("matrix", torch.eye(width))

    def measure(self, moments: Moments, kind: str) -> None:
        """Takes the scale from features that were counted."""
        mean, matrix = scaling(moments, kind)
        self.mean.copy_(mean)
        self.matrix.copy_(matrix)

    def forward(self, features: Float[Tensor, "*item width"]) -> Float[Tensor, "*item width"]:
        """The features on that scale, in fp32."""
        with torch.autocast(features.device.type, enabled=False):
            return (features.float() - self.mean) @ self.matrix.T


class TeacherHead(nn.Module):
    """A teacher's head: from the student's patches and summary into the teacher's space, and that space's scale."""

    def __init__(self, student: Widths, teacher: Widths, kind: str, width: int | None) -> None:
        super().__init__()
        self.patches = _adaptor(student.patches, teacher.patches, kind, width)
        self.summary = _adaptor(student.summary, teacher.summary, kind, width)
        self.patch_scale, self.summary_scale = Scale(teacher.patches), Scale(teacher.summary)

    def forward(self, view: TowerView) -> TowerView:
        """The student's view in the teacher's space."""
        return TowerView(self.patches(view.patches), self.summary(view.summary))

    def scaled(self, view: TowerView) -> TowerView:
        """The teacher's view on its scale."""
        return TowerView(self.patch_scale(view.patches), self.summary_scale(view.summary))


def _adaptor(ours: int, theirs: int, kind: str, width: int | None) -> nn.Module:
    if kind == "linear":
        return nn.Linear(ours, theirs)
    hidden = width or max(ours, theirs)
    # RADIO's head: normalised in between, so that its output has any scale.
    return nn.Sequential(nn.Linear(ours, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, theirs))


def add_heads(tower: PreTrainedModel, heads: Mapping[str, TeacherHead]) -> nn.ModuleDict:
    """Gives a tower heads by their teachers' names, which train with it and which `save_pretrained` leaves out."""
    modules = nn.ModuleDict({_key(name): head for name, head in heads.items()})
    setattr(tower, HEADS, modules.to(tower.device))
    leave_out_of_saves(tower, [f"{HEADS}.{name}" for name in modules.state_dict()])
    return modules


def let_towers_be_read(tower: PreTrainedModel) -> None:
    """Lets `tower(pixel_values=..., reader=f, layer=...)` return `f(view)`, computed inside the tower's forward.

    A loss must run there, with the heads, because only then the hooks of DDP and DeepSpeed apply to it. Without
    `reader` the forward is unchanged. Call this before the tower is wrapped.
    """
    original = tower.forward

    @functools.wraps(type(tower).forward)
    def forward(*args: Any, reader: Reader | None = None, layer: int | None = None, **kwargs: Any) -> Any:
        if reader is None:
            return original(*args, **kwargs)
        return reader(look(tower, kwargs["pixel_values"], layer, original))

    tower.forward = forward


def head_of_teacher(tower: Any, name: str) -> TeacherHead:
    """The head of a teacher."""
    return getattr(tower, HEADS)[_key(name)]


def _key(name: str) -> str:
    # No module may be called "", as the only teacher is, or have a dot.
    return f"teacher_{name}".replace(".", "_")
