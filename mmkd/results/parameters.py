"""The number of parameters of a saved model, from the headers of its weight files. Imports neither torch nor numpy."""

import json
import math
import struct
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from .adapter_base import ADAPTER_CONFIG, adapter_base

INDEX, WEIGHTS, ADAPTER = "model.safetensors.index.json", "model.safetensors", "adapter_model.safetensors"

_COUNTED = {"F64", "F32", "F16", "BF16"}
# Counters of batches and the like are no parameters. Other types hold packed weights, whose shapes do not count them.
_IGNORED = {"I64", "BOOL"}


def parameters_of(name: str, revision: str | None = None) -> int | None:
    """The number of parameters of a model in a folder or in the Hub's cache here; an adapter counts with its base.

    None where the weights are not on this machine, or are quantised.
    """
    counts = [_count(path) for path in _weight_files(name, revision)]
    known = [count for count in counts if count is not None]
    if not counts or len(known) < len(counts):
        return None
    if not Path(name, ADAPTER_CONFIG).is_file():
        return sum(known)
    below = parameters_of(*adapter_base(Path(name)))
    return None if below is None else below + sum(known)


def _weight_files(name: str, revision: str | None) -> list[Path]:
    folder = Path(name)
    if folder.is_dir():
        whole = sorted(folder.glob("model*.safetensors"))
        return whole or [path for path in [folder / ADAPTER] if path.is_file()]
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or not name:
        return []
    try:
        index = try_to_load_from_cache(name, INDEX, revision=revision)
    except HFValidationError:
        # Of a folder that is no longer here, say.
        return []
    names = [WEIGHTS]
    if isinstance(index, str):
        names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    paths = [try_to_load_from_cache(name, file, revision=revision) for file in names]
    # With one file missing, the sum of the others would be wrong.
    return [Path(path) for path in paths if isinstance(path, str)] if all(isinstance(p, str) for p in paths) else []


def _count(path: Path) -> int | None:
    """The number of weights in a safetensors file, whose header stands behind its length in 8 bytes."""
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            return None
        header = json.loads(file.read(struct.unpack("<Q", start)[0]))
    tensors = [facts for name, facts in header.items() if name != "__metadata__"]
    if any(facts["dtype"] not in _COUNTED | _IGNORED for facts in tensors):
        return None
    return sum(math.prod(facts["shape"]) for facts in tensors if facts["dtype"] in _COUNTED)
