"""Backbones of classifiers: any vision or language model of transformers, pooled to one feature vector per row."""

import inspect
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModel, CLIPVisionModelWithProjection, PreTrainedConfig, PreTrainedModel

from mmkd.seams.transformers_seam import generates_text, model_class

POOLINGS = ("pooler", "cls", "mean", "last")


def pooled(outputs: Any, pooling: str | None, mask: Tensor | None) -> Float[Tensor, "row width"]:
    """One feature vector per row from a backbone's output; `mask` is the attention mask of text."""
    if pooling == "pooler":
        projected = outputs.get("image_embeds")
        return (outputs.pooler_output if projected is None else projected).flatten(1)
    hidden = outputs.last_hidden_state
    if hidden.ndim == 4:
        # The feature map of a convolution, channels first, to a sequence of positions.
        hidden = hidden.flatten(2).transpose(1, 2)
    if pooling == "cls":
        return hidden[:, 0]
    if mask is None:
        return hidden.mean(1) if pooling == "mean" else hidden[:, -1]
    if pooling == "mean":
        weights = mask.to(hidden.dtype)[..., None]
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    # The last attended token, whichever side is padded.
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (positions * (mask != 0)).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def vision_tower(config: Any) -> PreTrainedConfig:
    """The config of the backbone: the vision tower of a CLIP-like model, otherwise the config itself."""
    if config.model_type == "timm_wrapper" and config.model_args:
        # timm's repositories have it in model_args, and transformers passes it a second time for a model without
        # classifier.
        config.model_args.pop("num_classes", None)
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return config
    if hasattr(vision, "projection_dim") and hasattr(config, "projection_dim"):
        vision.projection_dim = config.projection_dim
    return vision


def backbone_class(config: Any) -> Any:
    """The class that loads and builds the backbone of a config."""
    # CLIP's text embeddings are comparable with image features after the projection, which AutoModel leaves out.
    return CLIPVisionModelWithProjection if config.model_type == "clip_vision_model" else AutoModel


def new_backbone(config: Any, pooling: str | None) -> PreTrainedModel:
    """A backbone with random weights, without an unused pooler."""
    if config.model_type == "clip_vision_model":
        return CLIPVisionModelWithProjection(config)
    return AutoModel.from_config(config, **pooler_arguments(config, pooling))


def pooler_arguments(config: Any, pooling: str | None) -> dict[str, bool]:
    """The constructor arguments of a backbone with an optional pooler."""
    # An unused pooler gets no gradient, which is an error under DDP.
    return {"add_pooling_layer": pooling == "pooler"} if _has_optional_pooler(config) else {}


def _has_optional_pooler(config: Any) -> bool:
    model = model_class(config)
    return model is not None and "add_pooling_layer" in inspect.signature(model.__init__).parameters


def usual_pooling(config: Any, text: bool) -> str:
    """The usual pooling of a backbone: that of transformers' own classifiers, if they have one."""
    if not text:
        return "cls" if _has_optional_pooler(config) else "pooler"
    if _has_optional_pooler(config):
        return "pooler"
    return "last" if generates_text(config) else "cls"


def width_of(backbone: Any) -> int:
    """The width of a backbone's pooled features."""
    config = backbone.config
    if isinstance(backbone, CLIPVisionModelWithProjection):
        return config.projection_dim
    if config.model_type == "timm_wrapper":
        return backbone.timm_model.num_features
    sizes = getattr(config, "hidden_sizes", None)
    return sizes[-1] if sizes else config.hidden_size
