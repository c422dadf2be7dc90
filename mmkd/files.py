"""Writing a file so that there is always a whole one: the old or the new."""

import os
from contextlib import suppress
from pathlib import Path

from mmkd.errors import UserError


def write_file(path: Path, content: bytes | str) -> None:
    """Writes a file, text as UTF-8, so that after a crash there is the old one or the new one; makes its folder.

    Raises UserError where it cannot be written, on a full disk say.
    """
    content = content.encode() if isinstance(content, str) else content
    # By the process, since another may write the same file now.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        if os.name == "posix":
            _sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise _unwritable(f"{path} ({len(content):,} bytes)", error) from error


def append_to_file(path: Path, line: bytes) -> None:
    """Adds a line to a file, which may end in half of one after a crash. Raises UserError where it cannot."""
    try:
        with open(path, "ab") as file:
            file.write(line)
    except OSError as error:
        raise _unwritable(str(path), error) from error


def _unwritable(what: str, error: OSError) -> UserError:
    return UserError(
        f"{what} cannot be written: {error.strerror}. Make room, or choose another folder; what was finished before "
        "is kept, and the same command goes on from there."
    )


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
