"""Atomic writes: after a crash a file is complete, either the old version or the new one."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmkd.errors import UserError


def write_file(path: Path, content: bytes | str) -> None:
    """Replaces a file atomically, text as UTF-8; after a crash it is the old or the new one. Makes its folder.

    Raises UserError if the file cannot be written, for example on a full disk.
    """
    content = content.encode() if isinstance(content, str) else content
    # The name contains the process id, since another process may be writing the same file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        # A rename is durable only once its folder is synchronised.
        if os.name == "posix":
            _sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise _unwritable(f"{path} ({len(content):,} bytes)", error) from error


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write to, which takes the place of `path` once all is written; after a crash `path` is not there.

    Raises UserError if the files cannot be written, for example on a full disk.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        if path.exists():
            shutil.rmtree(path)
        temporary.mkdir(parents=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise _unwritable(str(path), error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def append_to_file(path: Path, line: bytes) -> None:
    """Appends a line to a file; after a crash the last line may be incomplete. Raises UserError if that fails."""
    try:
        with open(path, "ab") as file:
            file.write(line)
    except OSError as error:
        raise _unwritable(str(path), error) from error


def _unwritable(target: str, error: OSError) -> UserError:
    return UserError(
        f"{target} cannot be written: {error.strerror}. Make room, or choose another folder. Finished files are kept, "
        "and the same command continues from them."
    )


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
