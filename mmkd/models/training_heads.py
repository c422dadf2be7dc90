"""What a dual-head student has in training only: heads at inner stages, for aspects, and a gate of teachers."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmkd.errors import UserError
from mmkd.seams.transformers_seam import leave_out_of_saves

from .captured_features import blocks_of, capturing, feature_of, named_modules_of

HEADS = "training_heads"
"""The attribute of the student that holds them."""

_GRID = 7
"""Patches of a side that a head of a transformer's stage looks at, at most, as the authors' (14 patches become 7)."""


class MapHead(nn.Module):
    """Class logits of a feature map (OFA-KD): separable convolutions of stride 2, the mean over places, a layer.

    As many halvings as there are stages to come; of the last stage, a convolution of 1 x 1. Where the authors
    normalise over the batch, this normalises each image: a loss must not depend on which rows share a device.
    """

    def __init__(self, width: int, out: int, classes: int, halvings: int):
        super().__init__()
        widths = [round(width * (out / width) ** (step / max(1, halvings))) for step in range(halvings + 1)]
        parts = [_separable(before, after) for before, after in pairwise(widths)]
        if halvings == 0:
            parts = [nn.Sequential(nn.Conv2d(width, out, 1, bias=False), nn.GroupNorm(1, out), nn.ReLU())]
        self.convolutions, self.classifier = nn.Sequential(*parts), nn.Linear(out, classes)

    def forward(
        self, features: Float[Tensor, "row width high wide"], mask: Tensor | None = None
    ) -> Float[Tensor, "row class"]:
        return self.classifier(self.convolutions(features).mean((2, 3)))


class TokenHead(nn.Module):
    """Class logits of a transformer's tokens (OFA-KD): patches merged to 7 x 7, blocks of 4 heads, the mean, a layer.

    As many blocks as there are stages to come, at least one. Tokens that are no square of patches are not merged.
    """

    def __init__(self, width: int, classes: int, blocks: int, merges: int):
        super().__init__()
        heads = math.gcd(4, width)
        self.merges = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(4 * width), nn.Linear(4 * width, width, bias=False)) for _ in range(merges)
        )
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(max(1, blocks))
        )
        self.norm, self.classifier = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(
        self, features: Float[Tensor, "row token width"], mask: Int[Tensor, "row token"] | None = None
    ) -> Float[Tensor, "row class"]:
        tokens = features
        for merge in self.merges:
            tokens = merge(_merged(tokens))
        absent = None if mask is None else mask == 0
        for block in self.blocks:
            tokens = block(tokens, src_key_padding_mask=absent)
        tokens = self.norm(tokens)
        if mask is None:
            return self.classifier(tokens.mean(1))
        weights = mask.to(tokens.dtype)[..., None]
        return self.classifier((tokens * weights).sum(1) / weights.sum(1).clamp(min=1))


class Gate(nn.Module):
    """One score per teacher from a student's class logits (MST-Distill): two layers with nothing in between."""

    def __init__(self, classes: int, teachers: int):
        super().__init__()
        self.hidden, self.scores = nn.Linear(classes, 2 * classes), nn.Linear(2 * classes, teachers)

    def forward(self, logits: Float[Tensor, "row class"]) -> Float[Tensor, "row teacher"]:
        # The gate follows the student; the student is not to please the gate.
        return self.scores(self.hidden(logits.detach().to(self.hidden.weight.dtype)))


class TrainingHeads(nn.Module):
    """All of them, in one module of the student that is dropped when the training ends."""

    def __init__(
        self,
        stages: Mapping[str, nn.Module] | None = None,
        aspects: nn.Module | None = None,
        gate: nn.Module | None = None,
        gate_reads: str = "kd_logits",
    ):
        super().__init__()
        self.gate_reads = gate_reads
        self.names = tuple(stages or ())
        self.stages = nn.ModuleList((stages or {}).values())
        self.aspects, self.gate = aspects, gate

    def listening(self, backbone: nn.Module) -> AbstractContextManager[dict[str, Any]]:
        """In it, what the stages return is caught for `forward`."""
        return capturing(backbone, self.names)

    def forward(self, output: Any, captured: Mapping[str, Any], mask: Tensor | None) -> dict[str, Tensor]:
        """What each says of the student's output, by its name: `stage_0`, ..., `aspects` and `gate`."""
        said: dict[str, Tensor] = {}
        for number, (name, head) in enumerate(zip(self.names, self.stages, strict=True)):
            said[f"stage_{number}"] = head(_stage_feature(captured, name), mask)
        if self.aspects is not None:
            said["aspects"] = self.aspects(output.features)
        if self.gate is not None:
            said["gate"] = self.gate(getattr(output, self.gate_reads))
        return said


def add_training_heads(model: Any, heads: TrainingHeads) -> None:
    """Gives a student heads that train with it and that `save_pretrained` leaves out."""
    setattr(model, HEADS, heads.to(model.device))
    leave_out_of_saves(model, [f"{HEADS}.{name}" for name in heads.state_dict()])


def drop_training_heads(model: Any) -> None:
    """Takes them away again."""
    setattr(model, HEADS, None)


def stages_of(backbone: nn.Module, count: int) -> list[str]:
    """The modules at whose outputs `count` stages of a backbone end, spread over its depth; the last is its last.

    Raises UserError for more stages than the backbone has blocks, and for a backbone without a list of blocks.
    """
    try:
        blocks = blocks_of(backbone)
    except UserError:
        blocks = _numbered(backbone)
    if count > len(blocks):
        raise UserError(
            f"stage_heads is {count}, and {type(backbone).__name__} has {len(blocks)} blocks or stages: "
            f"choose 1 to {len(blocks)}.",
            because="meaning",
        )
    return [blocks[round(len(blocks) * (number + 1) / count) - 1] for number in range(count)]


def stage_head(feature: Any, name: str, classes: int, later: int, out: int, maskable: bool) -> nn.Module:
    """The head for a stage, by what it returned once; `later` stages follow it. Raises UserError for neither form."""
    tensor = _stage_feature({name: feature}, name)
    if tensor.ndim == 4:
        return MapHead(tensor.shape[1], max(tensor.shape[1], out), classes, later)
    if tensor.ndim == 3:
        side, merges = _side(tensor.shape[1]), 0
        while not maskable and side > _GRID and side % 2 == 0:
            side, merges = side // 2, merges + 1
        return TokenHead(tensor.shape[2], classes, later, merges)
    raise UserError(
        f"stage_heads reads {name}, which returns {tuple(tensor.shape)}: neither a feature map nor tokens. Leave "
        "stage_heads out, or take another student.",
        because="not built",
    )


def _stage_feature(captured: Mapping[str, Any], name: str) -> Tensor:
    feature = feature_of(captured[name])
    assert feature is not None, f"{name} returned no tensor"
    return feature


def _numbered(backbone: nn.Module) -> list[str]:
    """The stages of a backbone of timm: `layer1` to `layer4` of ResNets, else the children of a sequence of them."""
    modules = named_modules_of(backbone)
    layers = sorted(name for name in modules if name.rpartition(".")[2] in [f"layer{n}" for n in range(1, 9)])
    if layers:
        return layers
    rows = {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.Sequential) and name.rpartition(".")[2] in ("stages", "blocks", "layers", "features")
    }
    if not rows:
        raise UserError(
            f"stage_heads reads inner stages, and {type(backbone).__name__} has no list of blocks. Leave stage_heads "
            "out, or take another student.",
            because="not built",
        )
    outer = min(rows, key=lambda name: name.count("."))
    return [f"{outer}.{child}" for child, _ in rows[outer].named_children()]


def _separable(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, before, 3, 2, 1, groups=before, bias=False),
        nn.Conv2d(before, after, 1, bias=False),
        nn.GroupNorm(1, after),
        nn.ReLU(),
    )


def _side(tokens: int) -> int:
    """Patches of a side, with or without a token before them; 0 for no square."""
    for patches in (tokens, tokens - 1):
        if patches > 0 and math.isqrt(patches) ** 2 == patches:
            return math.isqrt(patches)
    return 0


def _merged(tokens: Float[Tensor, "row token width"]) -> Float[Tensor, "row token2 width4"]:
    """Each square of 2 x 2 patches as one token four times as wide; a token before the patches is dropped."""
    side = _side(tokens.shape[1])
    patches = tokens[:, tokens.shape[1] - side**2 :].unflatten(1, (side // 2, 2, side // 2, 2))
    return torch.flatten(patches.permute(0, 1, 3, 2, 4, 5).flatten(1, 2), 2)
