"""Files beside the shards of a cache without which its rows say nothing: the order of ids, the teacher's head."""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from mmkd.errors import UserError
from mmkd.models.heads import LMHead
from mmkd.precision import product_dtype

from .codec import Codec, TokenOrder
from .embedding_codec import EMBEDDING_DTYPES, EMBEDDINGS, EmbeddingCodec
from .identity import file_sha256
from .manifest import Manifest
from .state_codec import DTYPES, StateCodec

TOKEN_ORDER = "token_order.npy"
HEAD = "head.safetensors"

SIDE_FILES = {"token_order": TOKEN_ORDER, "head": HEAD}
"""Field of a manifest's signal with the sha256 of a file -> its name."""


_COUNT = range(1 << 24)
_SAID: dict[str, dict[str, Any]] = {
    "top_k": {"k": _COUNT, "tail_draws": _COUNT, "vocab_size": _COUNT, "token_order": str},
    "hidden": {"dtype": DTYPES, "width": _COUNT, "vocab_size": _COUNT, "visual": bool, "head": str}
    | {"head_dtype": DTYPES, "head_scale": float, "head_softcap": float | None},
    EMBEDDINGS: {"dtype": EMBEDDING_DTYPES, "width": _COUNT},
}
"""Kind of a cache -> what its manifest says of its bytes: a type, or the values that there are."""


def _check_signal(folder: Path, signal: Mapping[str, Any]) -> None:
    """Raises UserError where a manifest, which may be a stranger's, says something of the bytes that cannot be."""
    for name, wanted in _SAID.get(signal["kind"], {}).items():
        value = signal.get(name)
        of_a_type = isinstance(wanted, type | UnionType)
        number = float(value) if type(value) is int and wanted not in (str, bool) else value
        fits = isinstance(number, wanted) if of_a_type else type(value) in (int, str) and value in wanted
        if name not in signal or not fits:
            raise UserError(
                f"The manifest of {folder} says {name}: {value!r:.100}, which no cache of {signal['kind']} has. Build "
                "the cache again, or download it again."
            )


def codec_of(folder: Path, manifest: Manifest) -> Codec | StateCodec | EmbeddingCodec:
    """The codec of a cache. Raises UserError if its token order is missing or does not match the manifest."""
    signal = manifest.identity["signal"]
    _check_signal(folder, signal)
    if signal["kind"] == "hidden":
        return StateCodec(signal["dtype"], signal["width"], signal["vocab_size"], signal["visual"])
    if signal["kind"] == EMBEDDINGS:
        return EmbeddingCodec(signal["dtype"], signal["width"])
    if signal["kind"] == "log_probs":
        return Codec("log_probs", 1, 0, TokenOrder(np.zeros(0, dtype=np.int32)), boundaries="boundaries" in signal)
    path = folder / TOKEN_ORDER
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != signal["token_order"]:
        raise damage(path)
    try:
        ids = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError) as error:
        # Of pickled objects too, which could run code.
        raise damage(path) from error
    return Codec("top_k", signal["k"], signal["tail_draws"], TokenOrder(ids))


def damaged_side_files(folder: Path, manifest: Manifest) -> list[Path]:
    """The files beside the shards that are missing or do not match the manifest."""
    checksums = {folder / name: manifest.identity["signal"].get(field) for field, name in SIDE_FILES.items()}
    return [
        path
        for path, checksum in checksums.items()
        if checksum is not None and (not path.is_file() or file_sha256(path) != checksum)
    ]


def check_side_files(folder: Path, manifest: Manifest) -> None:
    """Raises UserError if a file beside the shards is missing or does not match the manifest."""
    for path in damaged_side_files(folder, manifest):
        raise damage(path)


def damage(path: Path) -> UserError:
    """The error about a file beside the shards that does not match the manifest."""
    return UserError(f"{path} is missing or damaged; run `mmkd cache build` again to write it anew.")


def order_bytes(order: TokenOrder) -> bytes:
    """The content of the file of a token order."""
    sink = io.BytesIO()
    np.save(sink, order.ids, allow_pickle=False)
    return sink.getvalue()


def head_bytes(head: LMHead) -> bytes:
    """The content of the file of a head, trimmed to its vocabulary, in bfloat16 where that loses nothing."""
    parts = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
    # Copies: a slice of a tensor would be refused, or bring the rest of its storage along.
    whole = {name: part.detach()[: head.vocab_size].cpu().clone() for name, part in parts.items()}
    short = {name: part.to(torch.bfloat16) for name, part in whole.items()}
    same = all(torch.equal(short[name].to(part.dtype), part) for name, part in whole.items())
    return safetensors.torch.save(short if same else whole)


def read_head(folder: Path, manifest: Manifest, device: str | torch.device = "cpu") -> LMHead:
    """The teacher's head in a cache of hidden states, in the type in which the device multiplies what it is."""
    signal = manifest.identity["signal"]
    dtype = product_dtype(getattr(torch, signal["head_dtype"]), device)
    # Of a CPU with a number, which ranks have, safetensors knows nothing.
    place = "cpu" if torch.device(device).type == "cpu" else str(device)
    try:
        with safe_open(folder / HEAD, framework="pt", device=place) as file:
            # Copies, and not a mapped file: training reads all of it again and again.
            weights = {name: file.get_tensor(name).to(dtype, copy=True) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise damage(folder / HEAD) from error
    return LMHead(weights["weight"], weights.get("bias"), signal["head_scale"], signal["head_softcap"])
