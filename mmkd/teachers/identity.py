"""What makes a teacher this teacher: its weights, under whatever name."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download


def weights_sha256(name: str, revision: str | None = None) -> str:
    """sha256 (hex) over the safetensors files of a folder or a Hub id, which are downloaded if they are not there.

    Raises ValueError when there are none.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=["*.safetensors"]))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"The teacher {name!r} has no safetensors files; save it with save_pretrained.")
    with ThreadPoolExecutor() as pool:
        digests = pool.map(file_sha256, files)
        content = "".join(f"{file.name} {digest}\n" for file, digest in zip(files, digests, strict=True))
    return hashlib.sha256(content.encode()).hexdigest()


def is_same_teacher(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether two identities are one teacher: by weights where both are known, else by name and revision."""
    if ours["weights"] and theirs["weights"]:
        return ours["weights"] == theirs["weights"]
    return (ours["name"], ours["revision"]) == (theirs["name"], theirs["revision"])


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
