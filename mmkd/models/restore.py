"""Weights of a checkpoint back into a model in memory, under whatever names they were saved."""

from pathlib import Path

from safetensors import safe_open
from transformers import PreTrainedModel


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
