"""Loading of a checkpoint's weights into a model in memory, if they were saved under other names."""

from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping


def save_under_published_names(model: PreTrainedModel) -> None:
    """Makes `save_pretrained` save the weights under the names of the published models of this architecture.

    transformers does so, and translates back, only for a model that it has loaded under such names. vLLM supports no
    other names for CLIP and SigLIP towers.
    """
    conversions: Any = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = conversions


def renamed_on_disk(model: PreTrainedModel, folder: Path) -> bool:
    """Whether weights in the folder's safetensors have other names than in the model.

    transformers saves some vision-language models under older names, which `from_pretrained` translates but
    `load_state_dict` does not.
    """
    saved: set[str] = set()
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            saved |= set(file.keys())
    return bool(saved - model.state_dict().keys())


def restore(model: PreTrainedModel, folder: Path) -> None:
    """Loads the folder's weights into the model with `from_pretrained`, which translates names."""
    loaded = type(model).from_pretrained(folder, dtype=model.dtype, use_safetensors=True)
    model.load_state_dict(loaded.state_dict())
