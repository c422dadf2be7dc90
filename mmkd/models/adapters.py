"""Adapters that become part of the model they were trained on."""

import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel

from mmkd.files import new_folder
from mmkd.results.adapter_base import adapter_base

from .load import load_model, load_processing_class
from .quantised_students import record_in_config, recorded_beside

_PROCESSING = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")
_PROCESSING += ("chat_template*", "*processor*.json")


def merge_adapter(adapter: Path, target: Path, trust_remote_code: bool = False) -> None:
    """Saves the model of an adapter with it merged into the weights, and its tokenizer or processor.

    Those beside the adapter go before the model's own, since training may have changed the chat template. What
    `target` holds is replaced; after a crash it is not there.
    """
    base, revision = adapter_base(adapter)
    hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    model: Any = PeftModel.from_pretrained(load_model(base, "student", **hub), str(adapter))
    merged = model.merge_and_unload()
    record_in_config(merged, recorded_beside(adapter))
    with new_folder(target) as folder:
        merged.save_pretrained(folder)
        load_processing_class(base, "student", **hub).save_pretrained(folder)
        for pattern in _PROCESSING:
            for path in adapter.glob(pattern):
                shutil.copyfile(path, folder / path.name)
