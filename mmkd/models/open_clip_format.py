"""CLIP as open_clip keeps it, and as transformers does: one network under two names for each of its weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from mmkd.errors import UserError
from mmkd.files import write_file

from .dual_encoder import OPEN_CLIP_CONFIG, PAIR_HEADS, DualEncoder

OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"

# The keys of a config that say all of a plain CLIP; any other one changes the network.
_TOP = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"}
_VISION = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"}
_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "hf_tokenizer_name"}
_TEXT |= {"tokenizer_kwargs"}

_HEAD_WIDTH, _MLP_RATIO, _CONTEXT, _VOCABULARY = 64, 4.0, 77, 49408
"""Of open_clip where its config does not say."""

_HIGHEST_ID = 2
"""As a text config's eos_token_id: CLIP reads a text's feature off its highest token, as open_clip does."""

_RESAMPLES = {"bicubic": 3, "bilinear": 2}

_VISION_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.proj": "visual_projection.weight",
}
_TEXT_NAMES = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "text_projection": "text_projection.weight",
}
_NORMS = {
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
_BLOCKS = {"visual.transformer.resblocks": "vision_model.encoder.layers"}
_BLOCKS |= {"transformer.resblocks": "text_model.encoder.layers"}
_IN_BLOCK = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
_IN_BLOCK |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
_TRANSPOSED = ("visual.proj", "text_projection")
_QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")


def is_plain_clip(model: dict[str, Any]) -> bool:
    """Whether a `model_cfg` of open_clip describes the network that transformers calls CLIPModel."""
    vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    sizes = (vision.get("layers", 12), vision.get("image_size", 224), vision.get("patch_size", 16))
    return (
        all(isinstance(size, int) for size in sizes)
        and not model.get("custom_text")
        and model.keys() <= _TOP
        and vision.keys() <= _VISION
        and text.keys() <= _TEXT
    )


def clip_config(model: dict[str, Any]) -> CLIPConfig:
    """The config of transformers of a plain CLIP's `model_cfg`."""
    vision, text = model["vision_cfg"], model["text_cfg"]
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    width, text_width = vision.get("width", 768), text.get("width", 512)
    towers: dict[str, Any] = {
        "vision_config": {
            "hidden_size": width,
            "intermediate_size": int(width * vision.get("mlp_ratio", _MLP_RATIO)),
            "num_hidden_layers": vision.get("layers", 12),
            "num_attention_heads": width // vision.get("head_width", _HEAD_WIDTH),
            "image_size": vision.get("image_size", 224),
            "patch_size": vision.get("patch_size", 16),
            "hidden_act": activation,
        },
        "text_config": {
            "hidden_size": text_width,
            "intermediate_size": int(text_width * text.get("mlp_ratio", _MLP_RATIO)),
            "num_hidden_layers": text.get("layers", 12),
            "num_attention_heads": text.get("heads", 8),
            "vocab_size": text.get("vocab_size", _VOCABULARY),
            "max_position_embeddings": text.get("context_length", _CONTEXT),
            "hidden_act": activation,
            "bos_token_id": 0,
            "eos_token_id": _HIGHEST_ID,
            "pad_token_id": 0,
        },
    }
    return CLIPConfig(projection_dim=model["embed_dim"], **towers)


def model_cfg(config: CLIPConfig, tokenizer_name: str | None = None) -> dict[str, Any]:
    """The `model_cfg` of open_clip of a CLIP of transformers. Raises UserError where open_clip has no such network."""
    vision: Any = config.vision_config
    text: Any = config.text_config
    activations = {vision.hidden_act, text.hidden_act}
    if len(activations) > 1 or not activations <= {"gelu", "quick_gelu"}:
        raise UserError(
            f"The towers of this CLIP have the activations {vision.hidden_act} and {text.hidden_act}; open_clip has "
            "gelu or quick_gelu for both. Load the model with transformers.",
            because="upstream",
        )
    if {vision.layer_norm_eps, text.layer_norm_eps} != {1e-5}:
        raise UserError(
            "The layer_norm_eps of this CLIP is not 1e-5, the only one that open_clip has. Load it with transformers.",
            because="upstream",
        )
    if text.eos_token_id not in (_HIGHEST_ID, text.vocab_size - 1):
        raise UserError(
            f"Texts of this CLIP end with token {text.eos_token_id}, and open_clip takes the highest of a text's "
            f"tokens, up to {text.vocab_size - 1}, for its end. Load the model with transformers.",
            because="upstream",
        )
    named = {} if tokenizer_name is None else {"hf_tokenizer_name": tokenizer_name}
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": activations == {"quick_gelu"},
        "vision_cfg": {
            "image_size": vision.image_size,
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "patch_size": vision.patch_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": text.intermediate_size / text.hidden_size,
            **named,
        },
    }


def from_open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a plain CLIP of open_clip under transformers' names."""
    ours: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        base, _, end = name.rpartition(".")
        if name == "attn_mask":
            continue
        if name == "logit_scale":
            ours[name] = tensor.reshape(())
        elif name in _VISION_NAMES | _TEXT_NAMES:
            ours[(_VISION_NAMES | _TEXT_NAMES)[name]] = tensor.T if name in _TRANSPOSED else tensor
        elif base in _NORMS:
            ours[f"{_NORMS[base]}.{end}"] = tensor
        else:
            ours |= _block_from_open_clip(name, tensor)
    return ours


def to_open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of transformers' CLIPModel under open_clip's names."""
    renamed = {theirs: name for name, theirs in (_VISION_NAMES | _TEXT_NAMES).items()}
    norms = {theirs: name for name, theirs in _NORMS.items()}
    ours: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        base, _, end = name.rpartition(".")
        if name == "logit_scale":
            ours[name] = tensor
        elif name in renamed:
            ours[renamed[name]] = tensor.T if renamed[name] in _TRANSPOSED else tensor
        elif base in norms:
            ours[f"{norms[base]}.{end}"] = tensor
        else:
            ours |= _block_to_open_clip(name, tensor, weights)
    return {name: tensor.contiguous() for name, tensor in ours.items()}


def _block_from_open_clip(name: str, tensor: Tensor) -> dict[str, Tensor]:
    for theirs, stack in _BLOCKS.items():
        if name.startswith(f"{theirs}."):
            number, _, rest = name.removeprefix(f"{theirs}.").partition(".")
            block = f"{stack}.{number}"
            if rest.startswith("attn.in_proj_"):
                kind = rest.removeprefix("attn.in_proj_")
                parts = zip(_QUERY_KEY_VALUE, tensor.chunk(3), strict=True)
                return {f"{block}.self_attn.{part}.{kind}": piece for part, piece in parts}
            base, _, end = rest.rpartition(".")
            if base in _IN_BLOCK:
                return {f"{block}.{_IN_BLOCK[base]}.{end}": tensor}
    raise UserError(f"The open_clip weights have a {name}, which is no part of a plain CLIP.", because="upstream")


def _block_to_open_clip(name: str, tensor: Tensor, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    within = {theirs: name for name, theirs in _IN_BLOCK.items()}
    for theirs, stack in _BLOCKS.items():
        if name.startswith(f"{stack}."):
            number, _, rest = name.removeprefix(f"{stack}.").partition(".")
            block = f"{theirs}.{number}"
            base, _, end = rest.rpartition(".")
            if base in within:
                return {f"{block}.{within[base]}.{end}": tensor}
            if base == "self_attn.q_proj":
                own = f"{stack}.{number}.self_attn"
                joined = torch.cat([weights[f"{own}.{part}.{end}"] for part in _QUERY_KEY_VALUE])
                return {f"{block}.attn.in_proj_{end}": joined}
            return {}
    raise AssertionError(f"{name} is of no CLIPModel")


def read_open_clip(folder: Path, weights: Path) -> tuple[Any, CLIPImageProcessorPil]:
    """A plain CLIP of open_clip's files, and its image processor. Raises UserError for weights that do not fit."""
    description = json.loads((folder / OPEN_CLIP_CONFIG).read_text())
    model: Any = CLIPModel(clip_config(description["model_cfg"]))
    named = {name.removeprefix("text."): tensor for name, tensor in load_file(str(weights)).items()}
    missing = model.load_state_dict(from_open_clip(named), strict=False)
    lost = [name for name in (*missing.missing_keys, *missing.unexpected_keys) if "position_ids" not in name]
    if lost:
        raise UserError(
            f"{weights} and the config beside it are of different models: {lost[0]} is in one of them only."
        )
    side = description["model_cfg"]["vision_cfg"].get("image_size", 224)
    return model, image_processor(description.get("preprocess_cfg", {}), side)


def image_processor(preprocess: dict[str, Any], side: int) -> CLIPImageProcessorPil:
    """The image processor that does what `preprocess_cfg` of open_clip says."""
    squashed = preprocess.get("resize_mode", "shortest") == "squash"
    both = {"height": side, "width": side}
    settings: dict[str, Any] = {"resample": _RESAMPLES[preprocess.get("interpolation", "bicubic")]}
    for ours, theirs in (("image_mean", "mean"), ("image_std", "std")):
        if theirs in preprocess:
            settings[ours] = list(preprocess[theirs])
    size = both if squashed else {"shortest_edge": side}
    return CLIPImageProcessorPil(size=size, crop_size=both, do_center_crop=not squashed, **settings)


def save_open_clip(encoder: DualEncoder, folder: str | Path) -> Path:
    """Writes a CLIP of transformers as open_clip loads it with `local-dir:FOLDER`, tokenizer included -> the folder.

    Raises UserError for a model that open_clip has no network for.
    """
    model: Any = encoder.model
    if not isinstance(model, CLIPModel):
        raise UserError(
            f"{encoder.name or 'The model'} is a {type(model).__name__}; open_clip's files are written of a CLIPModel "
            "of transformers only.",
            because="not built",
        )
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    processor: Any = encoder.processor  # pyright: ignore[reportAttributeAccessIssue]
    images = processor.image_processor
    # open_clip has CLIP's own tokenizer, and looks for another one in the folder itself.
    own_tokenizer = len(processor.tokenizer) == _VOCABULARY
    interpolation = {number: name for name, number in _RESAMPLES.items()}[int(images.resample)]
    description = {
        "model_cfg": model_cfg(model.config, None if own_tokenizer else encoder.name or "."),
        "preprocess_cfg": {
            "mean": list(images.image_mean),
            "std": list(images.image_std),
            "interpolation": interpolation,
            "resize_mode": "shortest" if images.do_center_crop else "squash",
        },
    }
    weights = {
        name: tensor.detach().cpu() for name, tensor in model.state_dict().items() if not name.startswith(PAIR_HEADS)
    }
    save_file(to_open_clip(weights), str(target / OPEN_CLIP_WEIGHTS), metadata={"format": "pt"})
    processor.tokenizer.save_pretrained(target)
    write_file(target / OPEN_CLIP_CONFIG, json.dumps(description, indent=2))
    return target
