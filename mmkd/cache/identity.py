"""Identity of a teacher: a hash of its weights, independent of its name."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import safe_open

from mmkd.errors import UserError

# Floating types by their names in safetensors headers.
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def weights_sha256(name: str, revision: str | None = None) -> str:
    """sha256 (hex) over the safetensors files of a folder or a Hub id, which are downloaded if necessary.

    Raises UserError if there are none.
    """
    files = _weight_files(name, revision)
    with ThreadPoolExecutor() as pool:
        digests = pool.map(file_sha256, files)
        content = "".join(f"{file.name} {digest}\n" for file, digest in zip(files, digests, strict=True))
    return hashlib.sha256(content.encode()).hexdigest()


def saved_dtype(name: str, revision: str | None = None) -> str:
    """The type of the first floating-point weight, which transformers uses if neither config nor user sets a type.

    Raises UserError as `weights_sha256` does.
    """
    with safe_open(_weight_files(name, revision)[0], framework="np") as file:
        types = (file.get_slice(weight).get_dtype() for weight in file.keys())  # noqa: SIM118
        return next((_FLOATS[dtype] for dtype in types if dtype in _FLOATS), "float32")


def _weight_files(name: str, revision: str | None) -> list[Path]:
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=["*.safetensors"]))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"The teacher {name!r} has no safetensors files; save it with save_pretrained.")
    return files


def is_same_teacher(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether two identities are the same teacher: by weights if both are known, otherwise by name and revision."""
    if ours["weights"] and theirs["weights"]:
        return ours["weights"] == theirs["weights"]
    return (ours["name"], ours["revision"]) == (theirs["name"], theirs["revision"])


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
