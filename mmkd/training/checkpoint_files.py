"""What tells whether the files of a checkpoint are those that were written: none of their formats has a checksum."""

import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from zipfile import BadZipFile

import torch
from safetensors import SafetensorError

from mmkd.errors import UserError, first_line
from mmkd.files import write_file

CHECKSUMS = "checksums.json"
"""File of a checkpoint with size and crc32 of the others."""

_PICKLED = {
    "pytorch_model.bin": "model",
    "pytorch_model.bin.index.json": "model",
    "adapter_model.bin": "adapter_model",
}
_UNREADABLE = (SafetensorError, OSError, EOFError, UnpicklingError, BadZipFile, RuntimeError, ValueError, KeyError)
_BLOCK = 1 << 22


def write_checksums(checkpoint: Path) -> None:
    """Notes what the files of a checkpoint are, once all are there."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != CHECKSUMS]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(_sum_of, files))
    names = [path.relative_to(checkpoint).as_posix() for path in files]
    sums = dict(zip(names, found, strict=True))
    write_file(checkpoint / CHECKSUMS, json.dumps(sums, indent=1))


def check_checkpoint(checkpoint: Path, part: int = 0, parts: int = 1) -> None:
    """Raises UserError for a checkpoint whose files changed since they were written, and for pickled weights.

    Each of `parts` processes reads its own part of the files. A checkpoint without checksums, of an
    earlier version, is taken as it is.
    """
    _refuse_pickled(checkpoint)
    path = checkpoint / CHECKSUMS
    if not path.is_file():
        return
    try:
        noted = {str(name): tuple(sums) for name, sums in json.loads(path.read_bytes()).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(checkpoint, f"its {CHECKSUMS} cannot be read") from error
    names = sorted(noted)[part::parts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: _sum_of(checkpoint / name), names))
    for name, sums in zip(names, found, strict=True):
        if sums != noted[name]:
            raise damaged(checkpoint, f"{name} is {'not there' if sums is None else 'not as it was written'}")


@contextmanager
def damage_named(checkpoint: Path) -> Iterator[None]:
    """Turns errors of reading a checkpoint into a UserError that names it."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except _UNREADABLE as error:
        raise damaged(checkpoint, f"{type(error).__name__}: {first_line(error)}") from error


def damaged(checkpoint: Path, what: str) -> UserError:
    """The error about a checkpoint that cannot be gone on from."""
    return UserError(
        f"The checkpoint {checkpoint} is damaged: {what}. Go on from an earlier one (--resume_from_checkpoint "
        f"{checkpoint.with_name('checkpoint-N')}), or delete it; true then takes the newest of the others."
    )


def _refuse_pickled(checkpoint: Path) -> None:
    """Raises UserError for weights that are pickled alone: reading them could run code."""
    for name, kind in _PICKLED.items():
        safe = (f"{kind}.safetensors", f"{kind}.safetensors.index.json")
        if (checkpoint / name).is_file() and not any((checkpoint / other).is_file() for other in safe):
            raise UserError(
                f"The checkpoint {checkpoint} has its weights in {name}, a pickle, which is never opened. Save them "
                f"as {kind}.safetensors."
            )


def _sum_of(path: Path) -> tuple[int, int] | None:
    """Size and crc32 of a file; None where there is none."""
    if not path.is_file():
        return None
    size, checksum = 0, 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return size, checksum
