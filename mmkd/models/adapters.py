"""Adapters that become part of the model they were trained on."""

import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError

from mmkd.errors import UserError, first_line
from mmkd.files import new_folder
from mmkd.results.adapter_base import adapter_base
from mmkd.results.parameters import ADAPTER

from .load import load_model, load_processing_class
from .quantised_students import record_in_config, recorded_beside

_PROCESSING = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")
_PROCESSING += ("chat_template*", "*processor*.json")


def with_adapter(model: Any, adapter: str | Path) -> Any:
    """The model with the adapter of a folder on it. Raises UserError for an adapter that is not safetensors."""
    weights = Path(adapter, ADAPTER)
    if not weights.is_file():
        raise UserError(
            f"The adapter {adapter} has no {weights.name}. Weights in another format are pickles, which are never "
            "opened: reading them could run code. Save it with safetensors (save_pretrained does)."
        )
    try:
        return PeftModel.from_pretrained(model, str(adapter))
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"The adapter {adapter} cannot be read: {first_line(error)}") from error


def merge_adapter(adapter: Path, target: Path, trust_remote_code: bool = False) -> None:
    """Saves the model of an adapter with it merged into the weights, and its tokenizer or processor.

    Those beside the adapter go before the model's own, since training may have changed the chat template. What
    `target` holds is replaced; after a crash it is not there.
    """
    base, revision = adapter_base(adapter)
    hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    model = with_adapter(load_model(base, "student", **hub), adapter)
    merged = model.merge_and_unload()
    record_in_config(merged, recorded_beside(adapter))
    with new_folder(target) as folder:
        merged.save_pretrained(folder)
        load_processing_class(base, "student", **hub).save_pretrained(folder)
        for pattern in _PROCESSING:
            for path in adapter.glob(pattern):
                shutil.copyfile(path, folder / path.name)
