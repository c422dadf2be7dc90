"""A class-level cache: a teacher's logits of every training row, computed once, checked whenever they are read."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmkd.cache.identity import file_sha256
from mmkd.errors import UserError
from mmkd.files import write_file

from .classifiers import ClassTeacher, check_classes

STEM = "class_logits"
LOGITS, MANIFEST = f"{STEM}.safetensors", f"{STEM}.json"
_SAMPLED = 1000


@dataclass(frozen=True)
class ClassLogits:
    """One row of logits per training row, and what made them."""

    logits: Float[Tensor, "row class"]
    identity: dict[str, Any]
    """Teacher, its settings, class names, and a digest of the rows."""


def compute_class_logits(
    teacher: ClassTeacher, read: Callable[[int], Any], rows: int, batch_size: int = 64
) -> Float[Tensor, "row class"]:
    """The teacher's logits of rows 0 to `rows`, each read by its number, in batches."""
    parts = []
    for first in range(0, rows, batch_size):
        parts.append(teacher.logits([read(row) for row in range(first, min(first + batch_size, rows))]))
    logits = torch.cat(parts).float()
    check_classes(logits.shape[1], teacher.class_names, "The teacher")
    return logits


def write_class_logits(folder: str | Path, cached: ClassLogits) -> None:
    """Writes logits and manifest; the manifest, with the logits' sha256, comes last and makes them valid."""
    write_rows(folder, STEM, {"logits": cached.logits}, cached.identity)


def has_class_logits(folder: str | Path) -> bool:
    """Whether a folder holds complete class logits."""
    return has_rows(folder, STEM)


def read_class_logits(folder: str | Path, expected: dict[str, Any]) -> ClassLogits:
    """The logits of a folder. Raises UserError when they are damaged, or `expected` differs from what made them.

    Keys of the identity that `expected` leaves out are not compared: a run that names no teacher takes any.
    """
    tensors, identity = read_rows(folder, STEM, expected, "class logits")
    return ClassLogits(tensors["logits"], identity)


def write_rows(folder: str | Path, stem: str, tensors: Mapping[str, Tensor], identity: dict[str, Any]) -> None:
    """Writes what is known of every row as `stem`.safetensors, and what made it as `stem`.json.

    The latter, with the file's sha256, comes last and makes it valid.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    manifest, file = folder / f"{stem}.json", folder / f"{stem}.safetensors"
    manifest.unlink(missing_ok=True)
    save_file({name: values.contiguous() for name, values in tensors.items()}, file)
    write_file(manifest, json.dumps({"identity": identity, "sha256": file_sha256(file)}, indent=1))


def has_rows(folder: str | Path, stem: str) -> bool:
    """Whether `write_rows` wrote all of it."""
    return (Path(folder) / f"{stem}.json").is_file()


def read_rows(
    folder: str | Path, stem: str, expected: dict[str, Any], what: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_rows` wrote, and what made it; `what` is its name in words.

    Raises UserError when it is not there or damaged, or `expected` differs from what made it.
    """
    folder = Path(folder)
    manifest, file = folder / f"{stem}.json", folder / f"{stem}.safetensors"
    if not manifest.is_file():
        raise UserError(f"{folder} holds no {what} ({manifest.name}); name the teacher, and they are computed once.")
    written = json.loads(manifest.read_text(encoding="utf-8"))
    if file_sha256(file) != written["sha256"]:
        raise UserError(f"{file} is damaged: its sha256 is not that of {manifest.name}. Delete the folder.")
    identity = written["identity"]
    for key, value in expected.items():
        if identity.get(key) != value:
            raise UserError(
                f"The {what} in {folder} were made with another {key.replace('_', ' ')}: "
                f"{_short(identity.get(key))}, the run has {_short(value)}. Name another folder as "
                "teacher_cache, or delete this one.",
                because="meaning",
            )
    return load_file(file), identity


def rows_digest(read: Callable[[int], bytes], rows: int) -> str:
    """sha256 (hex) over the number of rows and the content of at most a thousand of them, spread evenly."""
    digest = hashlib.sha256(str(rows).encode())
    for row in np.unique(np.linspace(0, rows - 1, min(rows, _SAMPLED)).astype(int)):
        digest.update(hashlib.sha256(read(int(row))).digest())
    return digest.hexdigest()


def captions_digest(captions: Sequence[str]) -> str:
    """sha256 (hex) over all captions."""
    return hashlib.sha256("\0".join(captions).encode()).hexdigest()


def class_identity(
    name: str, weights: str | None, teacher: ClassTeacher, class_names: Sequence[str], rows: str
) -> dict[str, Any]:
    """What decides class logits, as plain values."""
    return {
        "class_names": list(class_names),
        "rows": rows,
        "teacher": {"name": name, "weights": weights, "kind": teacher.kind},
        "settings": teacher.settings,
    }


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
