"""Vision towers by themselves: loaded, cut to fewer layers, and read as a map of patches and a summary."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from mmkd.errors import UserError, first_line
from mmkd.seams.transformers_seam import empty_like

from .features import new_backbone, pooler_arguments, vision_tower
from .load import computed_dtype, dtype_named
from .prune_sizes import kept_layers

_INSIDE = ("vision_model", "vision_tower", "vision_encoder", "visual")
"""Where models for images and texts keep their tower."""

_MOST_BEFORE = 16
"""Class and register tokens of a tower, at most."""

_LAYERS = ("layers", "layer", "blocks")
_DEPTHS = ("num_hidden_layers", "depth")
_FLATTENED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm4v_moe", "gemma4_vision")


@dataclass(frozen=True)
class TowerView:
    """What a tower says of images."""

    patches: Float[Tensor, "image height width channel"]
    summary: Float[Tensor, "image channel2"]
    """Of the whole image: the class token or the tower's pooled output, else the mean of its patches."""


def tower_config(name: str, role: str, **hub: Any) -> PreTrainedConfig:
    """The config of a tower, or of the tower inside a model for images and texts.

    Raises UserError where there is none, and for a tower that does not take images as a grid of pixels.
    """
    try:
        config = AutoConfig.from_pretrained(name, **hub)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"The {role} {name!r} cannot be loaded: {first_line(error)}") from error
    tower = vision_tower(config)
    kind = tower.model_type
    if kind.startswith(_FLATTENED):
        raise UserError(
            f"The {role} {name} has a {kind} tower, which reads an image as a list of patches and no image as such. "
            "Take a tower with images of one size, such as CLIP, SigLIP, DINOv2, ViT, or that of LLaVA, Gemma 3, "
            "InternVL or SmolVLM.",
            because="not built",
        )
    if not (hasattr(tower, "image_size") or hasattr(tower, "num_channels") or kind == "timm_wrapper"):
        raise UserError(
            f"The {role} {name} is a {kind} and sees no images. Name a vision tower, or a model that has one.",
            because="meaning",
        )
    return tower


def load_tower(
    name: str,
    role: str,
    *,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    **hub: Any,
) -> PreTrainedModel:
    """A tower with its weights, taken out of a model for images and texts if that is what the name stands for.

    `hub` are revision and trust_remote_code. Raises UserError when it cannot be loaded whole.
    """
    own = tower_config(name, role, **hub)
    config = AutoConfig.from_pretrained(name, **hub)
    wanted: Any = dtype if dtype == "auto" else dtype_named(dtype, role)
    settings: dict[str, Any] = {"dtype": computed_dtype(wanted, own, device), **hub}
    if attn_implementation is not None:
        settings["attn_implementation"] = attn_implementation
    alone = not hasattr(config, "vision_config")
    if alone:
        settings |= pooler_arguments(config, "cls")
    try:
        model, info = AutoModel.from_pretrained(name, use_safetensors=True, output_loading_info=True, **settings)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise UserError(f"The {role} {name!r} cannot be loaded: {first_line(error)}") from error
    tower, prefix = (model, "") if alone else _inside(model, name, role)
    missing = sorted(key for key in info["missing_keys"] if key.startswith(prefix))
    if missing:
        raise UserError(
            f"The {role} {name!r} lacks {len(missing)} of the weights that its config promises ({missing[0]}, ...); "
            "they would be random. Its weight files are incomplete, or its config belongs to another model."
        )
    tower.config.name_or_path = name
    return tower


def new_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """A tower with random weights."""
    if config.model_type == "clip_vision_model":
        # `new_backbone` gives CLIP's a projection, which is the classifier's.
        return AutoModel.from_config(config)
    return new_backbone(config, "cls")


def cut_tower(tower: PreTrainedModel, layers: int | Sequence[int]) -> PreTrainedModel:
    """A tower of some of the layers of another one, with their weights; the other one is not changed.

    `layers` is a count, spread evenly so that the first and the last layer stay, or ascending 0-based numbers. Raises
    UserError for layers that there are not, and for a tower whose layers are not one list.
    """
    config: Any = copy.deepcopy(tower.config)
    depth_key = next((key for key in _DEPTHS if isinstance(getattr(config, key, None), int)), None)
    stack = next(
        (
            (name, module)
            for name, module in tower.named_modules()
            if isinstance(module, nn.ModuleList)
            and name.rpartition(".")[2] in _LAYERS
            and depth_key is not None
            and len(module) == getattr(config, depth_key)
        ),
        None,
    )
    if stack is None:
        raise UserError(
            f"A {type(tower).__name__} does not keep its layers in one list, so that none can be left out. Take a "
            "transformer such as CLIP, SigLIP, DINOv2 or ViT, or remove student_layers.",
            because="not built",
        )
    prefix, modules = stack
    kept = kept_layers(layers, len(modules))
    assert depth_key is not None
    setattr(config, depth_key, len(kept))
    cut = empty_like(type(tower), config, tower.dtype)
    if getattr(tower, "pooler", True) is None:
        cut.pooler = None
    weights = {}
    for name, tensor in tower.state_dict().items():
        if name.startswith(f"{prefix}."):
            number, _, rest = name.removeprefix(f"{prefix}.").partition(".")
            if int(number) not in kept:
                continue
            name = f"{prefix}.{kept.index(int(number))}.{rest}"
        weights[name] = tensor
    cut.load_state_dict(weights)
    return cut


def look(
    tower: PreTrainedModel,
    pixels: Float[Tensor, "image color height width"],
    layer: int | None = None,
    forward: Callable[..., Any] | None = None,
) -> TowerView:
    """What a tower says of images: of its output, or with a `layer` of that hidden state, as LLaVA reads towers.

    The two differ for -1 where a tower normalises its output, as SigLIP does. `forward` is the tower itself by
    default. Raises UserError for an output that is no map of patches.
    """
    asked = {} if layer is None else {"output_hidden_states": True}
    outputs = (forward or tower)(pixel_values=pixels, return_dict=True, **asked)
    last = outputs.last_hidden_state
    states = last if layer is None else outputs.hidden_states[layer]
    if states.ndim == 4:
        patches = states.permute(0, 2, 3, 1)
        return TowerView(patches, patches.mean((1, 2)))
    config: Any = tower.config
    height, width, before = grid_of(states.shape[1], pixels.shape[-2:], getattr(config, "patch_size", None))
    patches = states[:, before:].unflatten(1, (height, width))
    pooled = outputs.get("pooler_output")
    # A pooler named so, as ViT's, is a layer that often nobody has trained.
    if pooled is not None and not isinstance(getattr(tower, "pooler", None), nn.Module):
        return TowerView(patches, pooled.flatten(1))
    return TowerView(patches, last[:, 0] if before else patches.mean((1, 2)))


def grid_of(tokens: int, size: Sequence[int], patch: int | Sequence[int] | None) -> tuple[int, int, int]:
    """(height, width, tokens before the patches) of a tower's output for images of a size.

    Raises UserError where the tokens are no grid.
    """
    sides = [patch, patch] if isinstance(patch, int) else list(patch or ())
    if len(sides) == 2:
        height, width = size[0] // sides[0], size[1] // sides[1]
        before = tokens - height * width
        if height * width and 0 <= before <= _MOST_BEFORE:
            return height, width, before
    for before in (0, 1):
        side = round((tokens - before) ** 0.5)
        if side and side * side == tokens - before:
            return side, side, before
    raise UserError(
        f"The vision tower gives {tokens} tokens of an image of {size[0]} x {size[1]} pixels, which are no grid of "
        "patches. Take a tower that keeps all patches.",
        because="not built",
    )


def image_side(config: Any) -> int:
    """The pixels of a side of the images that a tower is made for."""
    size = getattr(config, "image_size", None)
    if size is None and config.model_type == "timm_wrapper":
        size = (config.pretrained_cfg or {}).get("input_size", [3, 224, 224])[-1]
    return int(size if isinstance(size, int) else (size or [224])[-1])


def _inside(model: Any, name: str, role: str) -> tuple[PreTrainedModel, str]:
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in _INSIDE and isinstance(module, PreTrainedModel):
            return module, f"{path}."
    raise UserError(
        f"The {role} {name} is a {type(model).__name__}, in which no vision tower was recognised. Save the tower "
        "alone with save_pretrained, and name that folder.",
        because="not built",
    )
