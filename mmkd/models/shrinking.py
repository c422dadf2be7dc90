"""Automatic weight inheritance of TinyCLIP (2309.12314): which channels, heads, neurons and layers to keep is learnt.

Each has a mask of an L0 penalty (hard concrete, 1712.01312). While the encoder trains, the expected share of weights
is pushed down to a target; then the masks are frozen, and `shrinking_cut` makes a smaller model of what is left.

In the authors' code every layer is left with heads and neurons of its own. Here all layers of a tower keep equally
many, so that the result is an ordinary model of transformers. Heads make up the width, and the FFN is as wide as the
target allows; the masks decide which heads, channels, neurons and layers these are.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import multi_head_attention_forward

from mmkd.errors import UserError

from .inherit import TOWERS, TowerSize, tower_sizes

_LOW, _HIGH, _TEMPERATURE, _SOFTNESS = -0.1, 1.1, 2 / 3, 0.8
"""The stretched interval and the temperature of hard concrete masks, and the factor of masks without noise (CoFi)."""

_OPEN = 10.0
"""The logit that all masks begin with: open with near certainty."""

_NOISE = 1e-6

_LEAST = 0.05
"""The smallest mask of the channels of one head that are likeliest to stay."""


@dataclass(frozen=True)
class Masks:
    """The masks of a tower, as numbers of 0 to 1: `heads` and `ffn` have a row for each block.

    Blocks are the layers, and after them the attention that pools a SigLIP's patches.
    """

    hidden: Float[Tensor, "channel"]
    heads: Float[Tensor, "block head"]
    ffn: Float[Tensor, "block neuron"]
    layers: Float[Tensor, "layer"]

    def block(self, number: int) -> Tensor:
        """The mask of a whole block; nothing leaves out the pooling."""
        return self.layers[number] if number < len(self.layers) else self.layers.new_ones(())


class TowerMasks(nn.Module):
    """The logits of a tower's masks, and the two multipliers of its constraint."""

    def __init__(self, size: TowerSize, pools: bool, target: float):
        super().__init__()
        self.size, self.pools, self.target = size, pools, target
        blocks = size.layers + pools
        shapes = {"hidden": (size.width,), "heads": (blocks, size.heads), "ffn": (blocks, size.ffn)}
        shapes["layers"] = (size.layers,)
        self.logits = nn.ParameterDict(
            {
                kind: nn.Parameter(torch.full(shape, _OPEN))
                for kind, shape in (shapes | {"layers": (size.layers,)}).items()
            }
        )
        self.multipliers = nn.Parameter(torch.full((2,), 10.0))

    def expected_share(self) -> Float[Tensor, ""]:
        """The expected share of the layers' weights that is left, differentiable."""
        open_ = {kind: _open_probability(logits) for kind, logits in self.logits.items()}
        blocks = torch.cat([open_["layers"], open_["layers"].new_ones(int(self.pools))])[:, None]
        channels = 4 * self.size.channels * (open_["heads"] * blocks).sum() + 2 * (open_["ffn"] * blocks).sum()
        return open_["hidden"].sum() * channels / self._whole.weights

    def penalty(self, target: float) -> Float[Tensor, ""]:
        """The Lagrangian of having more than a share of the weights left, which goes down to that of `self.target`.

        The authors' code counts what is too much only. Less than the last target counts here too, since a short
        schedule overshoots.
        """
        share = self.expected_share()
        distance = (share - target).clamp(min=0) + (self.target - share).clamp(min=0)
        return self.multipliers[0] * distance + self.multipliers[1] * distance.square()

    def sampled(self, noise: Mapping[str, Tensor]) -> Masks:
        """Masks with noise, each of which is often exactly 0 or 1, differentiable."""
        masks = {}
        for kind, logits in self.logits.items():
            uniform = noise[kind].to(logits.device)
            soft = ((uniform.log() - (1 - uniform).log() + logits) / _TEMPERATURE).sigmoid()
            masks[kind] = (soft * (_HIGH - _LOW) + _LOW).clamp(0, 1)
        # A tower without any channel would have no direction, and NaN for a cosine.
        likely = self.logits["hidden"].detach().topk(self.size.channels).indices
        floor = torch.zeros_like(masks["hidden"]).index_fill(0, likely, _LEAST)
        return Masks(**{**masks, "hidden": masks["hidden"].maximum(floor)})

    def noise(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Random numbers for `sampled`."""
        return {
            kind: torch.rand(logits.shape, generator=generator) * (1 - 2 * _NOISE) + _NOISE
            for kind, logits in self.logits.items()
        }

    @torch.no_grad()
    def kept_size(self) -> TowerSize:
        """The sizes that the tower would be cut to now."""
        whole = self.size
        heads = max(1, round(_open_probability(self.logits["hidden"]).sum().item() / whole.channels))
        layers = max(1, round(_open_probability(self.logits["layers"]).sum().item()))
        filled = self._whole.filled(layers + self.pools, heads, self.target)
        return TowerSize(layers, filled.width, heads, filled.ffn)

    @torch.no_grad()
    def decided(self) -> Masks:
        """Masks without noise: 0 for everything that is left out."""
        size = self.kept_size()
        counts = {"hidden": size.width, "heads": size.heads, "ffn": size.ffn, "layers": size.layers}
        masks = {}
        for kind, logits in self.logits.items():
            kept = logits.sort(dim=-1, descending=True, stable=True).indices[..., : counts[kind]]
            soft = (logits / _TEMPERATURE * _SOFTNESS).sigmoid()
            masks[kind] = torch.zeros_like(soft).scatter(-1, kept, soft.gather(-1, kept))
        return Masks(**masks)

    @property
    def _whole(self) -> TowerSize:
        return TowerSize(self.size.layers + self.pools, self.size.width, self.size.heads, self.size.ffn)


class Shrinking(nn.Module):
    """The masks of both towers of a dual encoder, and the hooks by which its modules compute with them.

    `targets` are shares of the layers' weights by tower. Raises UserError for an encoder of other modules than those
    of CLIP and SigLIP.
    """

    frozen: Tensor

    def __init__(self, model: Any, targets: Mapping[str, float]):
        super().__init__()
        masks = {}
        for tower, size in tower_sizes(model.config).items():
            module = getattr(model, f"{tower}_model", None)
            _check_tower(module, type(model).__name__)
            masks[tower] = TowerMasks(size, _pools(module), targets[tower])
        self.towers = nn.ModuleDict(masks)
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool))
        self._noise: dict[str, dict[str, Tensor]] = {}
        self._current: dict[str, Masks] = {}
        self._hooks: list[Any] = []
        self._attach(model)

    def masks_of(self, tower: str) -> TowerMasks:
        """The masks of a tower."""
        masks = self.towers[tower]
        assert isinstance(masks, TowerMasks)
        return masks

    def sample(self, seed: int, step: int) -> None:
        """Draws the noise of one step; the same on all ranks, and in all micro-batches."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        self._noise = {tower: self.masks_of(tower).noise(generator) for tower in self.towers}

    def freeze(self) -> None:
        """Decides the masks for good."""
        self.frozen.fill_(True)
        for tower in self.towers:
            masks = self.masks_of(tower)
            decided = masks.decided()
            self._current[tower] = decided
            masks.requires_grad_(False)

    def penalty(self, progress: float) -> Float[Tensor, ""]:
        """The constraint's part of the loss, when this share of the way to the targets is gone; 0 once frozen."""
        parts = [
            masks.penalty(1 - min(1.0, progress) * (1 - masks.target)) for masks in map(self.masks_of, self.towers)
        ]
        return torch.stack(parts).sum() * (~self.frozen)

    def remove(self) -> None:
        """Takes the hooks from the model, which computes without masks again."""
        for hook in self._hooks:
            hook.remove()

    def current(self, tower: str, training: bool) -> Masks:
        """The masks that a tower computes with in a forward pass."""
        masks = self.masks_of(tower)
        if training and not bool(self.frozen):
            if not self._noise:
                self.sample(0, 0)
            return masks.sampled(self._noise[tower])
        return masks.decided()

    def _attach(self, model: Any) -> None:
        for tower in TOWERS:
            module = getattr(model, f"{tower}_model")

            def begin(module: nn.Module, _: Any, tower: str = tower) -> None:
                self._current[tower] = self.current(tower, module.training)

            self._hooks.append(module.register_forward_pre_hook(begin))
            self._hook(module.embeddings, tower, lambda out, _, masks: out * masks.hidden)
            for norm in (part for part in module.modules() if isinstance(part, nn.LayerNorm)):
                self._hook(norm, tower, lambda _, given, masks, norm=norm: _masked_norm(norm, given[0], masks.hidden))
            for number, layer in enumerate(module.encoder.layers):
                self._hook_out(layer.self_attn.out_proj, tower, number, "heads")
                self._hook_out(layer.mlp.fc2, tower, number, "ffn")
            if _pools(module):
                number = len(module.encoder.layers)
                pool = functools.partial(_masked_pooling, module.head.attention)
                self._hook(module.head.attention, tower, lambda _, given, masks, pool=pool: (pool(given, masks), None))
                self._hook_out(module.head.mlp.fc2, tower, number, "ffn")
        if isinstance(getattr(model.text_model, "head", None), nn.Linear):
            self._hooks.append(model.text_model.head.register_forward_hook(self._compared_channels))

    def _compared_channels(self, head: nn.Module, _: Any, out: Tensor) -> Tensor:
        """Of SigLIP's texts the channels that its vision tower, whose output nothing projects, still has."""
        return out * (self.current("vision", head.training).hidden > 0).to(out.dtype)

    def _hook(self, module: nn.Module, tower: str, change: Callable[[Any, Any, Masks], Any]) -> None:
        """Changes a module's output."""

        def hook(module: nn.Module, given: Any, out: Any) -> Any:
            changed = change(out, given, self._current[tower])
            return changed if isinstance(changed, tuple) else changed.to(out.dtype)

        self._hooks.append(module.register_forward_hook(hook))

    def _hook_out(self, module: nn.Module, tower: str, number: int, kind: str) -> None:
        """Masks what goes into a block's last layer, by head or neuron, and the channels that come out."""

        def before(module: nn.Module, given: Any) -> Any:
            mask = getattr(self._current[tower], kind)[number]
            mask = mask.repeat_interleave(given[0].shape[-1] // len(mask))
            return (given[0] * mask.to(given[0].dtype),)

        self._hooks.append(module.register_forward_pre_hook(before))
        self._hook(module, tower, lambda out, _, masks: out * (masks.hidden * masks.block(number)))


def _open_probability(logits: Tensor) -> Tensor:
    """The probability that a mask is not 0."""
    threshold = math.log(-_LOW / _HIGH)
    return (logits - _TEMPERATURE * threshold).sigmoid()


def _masked_norm(norm: nn.LayerNorm, states: Tensor, hidden: Tensor) -> Tensor:
    """The norm of the channels that are kept, and 0 in the others."""
    kept = (hidden > 0).float()
    states = states.float() * kept
    mean = states.sum(-1, keepdim=True) / kept.sum()
    centred = (states - mean) * kept
    variance = centred.square().sum(-1, keepdim=True) / kept.sum()
    return (centred * (variance + norm.eps).rsqrt() * norm.weight.float() + norm.bias.float()) * kept


def _masked_pooling(attention: nn.MultiheadAttention, given: Any, masks: Masks) -> Tensor:
    """What SigLIP's pooling attends to, with masked heads; its input is masked already, but for the probe."""
    query, key, value = (states.transpose(0, 1) for states in given)
    heads = masks.heads[-1].repeat_interleave(attention.head_dim)
    out, _ = multi_head_attention_forward(
        query * (masks.hidden > 0),
        key,
        value,
        attention.embed_dim,
        attention.num_heads,
        attention.in_proj_weight,
        attention.in_proj_bias,
        None,
        None,
        False,
        0.0,
        attention.out_proj.weight * heads,
        attention.out_proj.bias,
        need_weights=False,
    )
    return out.transpose(0, 1) * masks.hidden


def _pools(tower: Any) -> bool:
    """Whether a tower pools its patches by attention, as SigLIP's vision tower does."""
    return isinstance(getattr(getattr(tower, "head", None), "attention", None), nn.MultiheadAttention)


def _check_tower(tower: Any, model: str) -> None:
    layers = getattr(getattr(tower, "encoder", None), "layers", None)
    first = layers[0] if isinstance(layers, nn.ModuleList) and len(layers) else None
    if not (
        hasattr(tower, "embeddings") and hasattr(first, "self_attn") and hasattr(getattr(first, "mlp", None), "fc2")
    ):
        raise UserError(
            f"inherit: auto learns masks of the modules of CLIP and SigLIP, and a {model} has others. Use inherit: "
            "manual, which works with any encoder.",
            because="not built",
        )
