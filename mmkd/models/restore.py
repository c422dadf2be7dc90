"""Weights of a checkpoint back into a model in memory, under whatever names they were saved."""

from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping


def save_under_published_names(model: PreTrainedModel) -> None:
    """Makes `save_pretrained` give the weights the names of the published models of this architecture.

    transformers does so by itself for a model that it has loaded under such names, and translates them back; vLLM
    knows a CLIP or SigLIP tower by no other names.
    """
    conversions: Any = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = conversions


def renamed_on_disk(model: PreTrainedModel, folder: Path) -> bool:
    """Whether the folder's safetensors call the model's weights otherwise than the model does.

    transformers saves some vision-language models under their older names, which `from_pretrained` translates and
    `load_state_dict` takes for other weights.
    """
    saved: set[str] = set()
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            saved |= set(file.keys())
    return bool(saved - model.state_dict().keys())


def restore(model: PreTrainedModel, folder: Path) -> None:
    """Loads the folder's weights into the model, by way of `from_pretrained` and its names."""
    loaded = type(model).from_pretrained(folder, dtype=model.dtype, use_safetensors=True)
    model.load_state_dict(loaded.state_dict())
