"""Loading of a checkpoint's weights into a model in memory, if they were saved under other names."""

from pathlib import Path

from safetensors import safe_open
from transformers import PreTrainedModel


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
