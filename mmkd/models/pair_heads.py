"""What a dual encoder has during its distillation only: projections into the space of each teacher, and a scale."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmkd.seams.transformers_seam import leave_out_of_saves

from .dual_encoder import PAIR_HEADS, DualEncoder

_FIRST_SCALE = 1 / 0.07
"""Of CLIP at the start of its training."""


class PairHead(nn.Module):
    """A teacher's head: the student's images and texts in its space, and the scale of similarities across both."""

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        self.images = nn.Identity() if student == teacher else nn.Linear(student, teacher)
        self.texts = nn.Identity() if student == teacher else nn.Linear(student, teacher)
        self.log_scale = nn.Parameter(torch.tensor(math.log(_FIRST_SCALE)))

    @property
    def scale(self) -> Tensor:
        """What similarities between student and teacher are multiplied by."""
        return self.log_scale.exp().squeeze()


def add_pair_heads(encoder: DualEncoder, widths: Mapping[str, int]) -> None:
    """Gives a student a head per teacher, by name -> width; they train with it and are not saved into it."""
    trunk = encoder.trunk
    heads = nn.ModuleDict({_key(name): PairHead(encoder.width, width) for name, width in widths.items()})
    setattr(trunk, PAIR_HEADS, heads.to(next(trunk.parameters()).device))
    if isinstance(trunk, PreTrainedModel):
        leave_out_of_saves(trunk, [f"{PAIR_HEADS}.{name}" for name in heads.state_dict()])


def pair_heads(encoder: DualEncoder) -> nn.ModuleDict:
    """The heads of a student, by `head_for`."""
    return getattr(encoder.trunk, PAIR_HEADS)


def pair_head(encoder: DualEncoder, name: str) -> PairHead:
    """The head of a teacher."""
    head = pair_heads(encoder)[_key(name)]
    assert isinstance(head, PairHead)
    return head


def let_pairs_be_read(encoder: DualEncoder) -> None:
    """Lets `model(reader=f)` return `f()`, computed inside the model's forward; without `reader` it is unchanged.

    A loss must run there, since only then the hooks of DDP and DeepSpeed and the types of mixed precision apply to it.
    Call this before the model is wrapped.
    """
    original = encoder.model.forward

    @functools.wraps(type(encoder.model).forward)
    def forward(*args: Any, reader: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        return original(*args, **kwargs) if reader is None else reader()

    encoder.model.forward = forward


def _key(name: str) -> str:
    # No module may be called "", as the only teacher is, or have a dot.
    return f"teacher_{name}".replace(".", "_")
