"""The smaller model that masked towers are cut to: an ordinary model of transformers that computes the same."""

import copy
import re
from typing import Any

import torch
from torch import Tensor

from mmkd.seams.transformers_seam import empty_like

from .inherit import TOWERS, inherit_config
from .shrinking import Masks, Shrinking

_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.*)")


class _Cut:
    """What is kept of a tower, and by what its outputs are multiplied."""

    def __init__(self, masks: Masks, channels: int):
        self.masks, self.channels = masks, channels
        self.hidden = masks.hidden.nonzero().flatten()
        self.layers = masks.layers.nonzero().flatten().tolist()

    def heads(self, block: int) -> Tensor:
        """The channels of the kept heads of a block."""
        kept = self.masks.heads[block].nonzero().flatten()
        return (kept[:, None] * self.channels + torch.arange(self.channels, device=kept.device)).flatten()

    def head_scales(self, block: int) -> Tensor:
        """A mask for every channel of a block's heads."""
        return self.masks.heads[block].repeat_interleave(self.channels)

    def neurons(self, block: int) -> Tensor:
        """The kept neurons of a block."""
        return self.masks.ffn[block].nonzero().flatten()


@torch.no_grad()
def cut_model(model: Any, shrinking: Shrinking) -> Any:
    """A model of what the masks keep; the masked one is not changed."""
    sizes = {tower: shrinking.masks_of(tower).kept_size() for tower in TOWERS}
    small = empty_like(type(model), inherit_config(copy.deepcopy(model.config), sizes), model.dtype)
    cuts = {tower: _Cut(shrinking.current(tower, training=False), sizes[tower].channels) for tower in TOWERS}
    weights, expected = {}, small.state_dict().keys()
    for name, tensor in model.state_dict().items():
        kept = _kept(name, tensor.float(), cuts)
        # Modules that a training hangs on a model are none of its own.
        if kept is not None and kept[0] in expected:
            weights[kept[0]] = kept[1].to(tensor.dtype).contiguous()
    small.load_state_dict(weights)
    return small.to(model.device).train(model.training)


def _kept(name: str, tensor: Tensor, cuts: dict[str, _Cut]) -> tuple[str, Tensor] | None:
    """The new name and the kept part of a weight; None for one of a layer that is left out."""
    if name in ("visual_projection.weight", "text_projection.weight"):
        return name, tensor[:, cuts["vision" if name.startswith("visual") else "text"].hidden]
    tower = next((tower for tower, prefix in TOWERS.items() if name.startswith(prefix)), None)
    if tower is None:
        return name, tensor
    cut, rest = cuts[tower], name.removeprefix(TOWERS[tower])
    if match := _LAYER.fullmatch(rest):
        number = int(match[1])
        if number not in cut.layers:
            return None
        place = f"{TOWERS[tower]}encoder.layers.{cut.layers.index(number)}.{match[2]}"
        return place, _of_block(match[2], tensor, cut, number)
    if rest.startswith("head.") and tower == "text":
        rows = tensor[cuts["vision"].hidden]
        return name, rows[:, cut.hidden] if rest == "head.weight" else rows
    if rest.startswith("head.") and rest != "head.probe":
        return name, _of_block(rest.removeprefix("head."), tensor, cut, len(cut.masks.layers))
    if rest == "head.probe":
        return name, tensor[..., cut.hidden]
    if rest.startswith("embeddings."):
        # Of patches the output comes first, of tables the entry.
        last = "patch_embedding" not in rest
        scaled = tensor.movedim(-1, 0) if last else tensor
        scaled = scaled[cut.hidden] * cut.masks.hidden[cut.hidden].reshape(-1, *[1] * (scaled.ndim - 1))
        return name, scaled.movedim(0, -1) if last else scaled
    return name, tensor[cut.hidden]


def _of_block(name: str, tensor: Tensor, cut: _Cut, number: int) -> Tensor:
    """The kept part of a weight of a block."""
    out = cut.masks.hidden * cut.masks.block(number)
    heads, neurons, hidden = cut.heads(number), cut.neurons(number), cut.hidden
    if "in_proj_" in name:
        parts = tensor.unflatten(0, (3, -1))[:, heads]
        return (parts[..., hidden] if name.endswith("weight") else parts).flatten(0, 1)
    if re.search(r"[qkv]_proj\.", name):
        return tensor[heads][:, hidden] if name.endswith("weight") else tensor[heads]
    if name.endswith(("out_proj.weight", "fc2.weight")):
        scale, kept = (cut.masks.ffn[number], neurons) if "fc2" in name else (cut.head_scales(number), heads)
        return (tensor * scale * out[:, None])[hidden][:, kept]
    if name.endswith(("out_proj.bias", "fc2.bias")):
        return (tensor * out)[hidden]
    if "fc1" in name:
        return tensor[neurons][:, hidden] if name.endswith("weight") else tensor[neurons]
    return tensor[hidden]
