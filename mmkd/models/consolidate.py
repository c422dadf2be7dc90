"""Conversion of a sharded checkpoint to a single student folder."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from accelerate.utils import merge_fsdp_weights
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from mmkd.errors import UserError
from mmkd.results.parameters import ADAPTER
from mmkd.seams.deepspeed_seam import whole_weights

_FSDP = "pytorch_model_fsdp_0"
_ADAPTER = "adapter_config.json"


def consolidate(checkpoint: Path, output: Path) -> None:
    """Writes a folder that `from_pretrained` loads: config, tokenizer and weights in safetensors.

    Reads shards of FSDP2 and of DeepSpeed ZeRO. Raises UserError for a folder without shards and for an output folder
    that is not empty.
    """
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} is not empty. Name another folder for the student.")
    weights = _weights(checkpoint)
    output.mkdir(parents=True, exist_ok=True)
    if (checkpoint / _ADAPTER).is_file():
        shutil.copy(checkpoint / _ADAPTER, output)
        # Names in ZeRO's shards contain the name of the adapter (default); those in PEFT's files do not.
        weights = {name.replace(".default.", "."): tensor for name, tensor in weights.items()}
        save_file(weights, output / ADAPTER, metadata={"format": "pt"})
    else:
        config = AutoConfig.from_pretrained(checkpoint)
        auto_class: Any = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        dtype = next(iter(weights.values())).dtype
        model = auto_class.from_config(config, dtype=dtype)
        model.load_state_dict(weights)
        model.save_pretrained(output)
    for path in checkpoint.iterdir():
        # What a tokenizer or processor consists of.
        kept = path.suffix in (".json", ".jinja", ".txt", ".model") and path.name != "trainer_state.json"
        if kept and not (output / path.name).exists():
            shutil.copy(path, output)


def _weights(checkpoint: Path) -> dict[str, Tensor]:
    if (checkpoint / _FSDP).is_dir():
        if not (checkpoint / "config.json").is_file() and not (checkpoint / _ADAPTER).is_file():
            raise UserError(f"{checkpoint} has shards but no config.json, so nothing says which model they are of.")
        with tempfile.TemporaryDirectory() as folder:
            merge_fsdp_weights(str(checkpoint / _FSDP), folder)
            return load_file(Path(folder) / "model.safetensors")
    if (checkpoint / "latest").is_file():
        return whole_weights(checkpoint)
    if any(checkpoint.glob("*.safetensors")):
        raise UserError(f"{checkpoint} holds a whole student already: load it as it is.")
    raise UserError(
        f"{checkpoint} holds no shards of a training under FSDP2 or ZeRO. Name a checkpoint-N folder of a run."
    )
