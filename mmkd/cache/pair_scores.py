"""Scores of pairs by a slow scorer, kept on disk as they are made: a file of records that each have a checksum.

    FOLDER/identity.json      what made the scores
    FOLDER/rank-00000.scores  records of 24 bytes: key, score, crc32; each process writes a file of its own

A process that is killed leaves at most an unfinished record at the end, which is cut off when the folder is opened
again.
"""

import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from mmkd.errors import UserError
from mmkd.files import write_file

from .manifest import differences
from .sequence_keys import KEY_BYTES

_RECORD = struct.Struct(f"<{KEY_BYTES}sfI")
IDENTITY = "identity.json"


class PairScores:
    """The scores of pairs that are known, by key; with a folder also those of earlier runs, and kept for later ones.

    Raises UserError for a folder of another scorer, and for a damaged record.
    """

    def __init__(self, folder: str | Path | None = None, identity: Mapping[str, Any] | None = None, rank: int = 0):
        self.folder, self.rank = None if folder is None else Path(folder), rank
        self.known: dict[bytes, float] = {}
        self._file: Any = None
        if self.folder is not None:
            self._open(self.folder, dict(identity or {}))

    def __len__(self) -> int:
        return len(self.known)

    def __contains__(self, key: bytes) -> bool:
        return key in self.known

    def __getitem__(self, key: bytes) -> float:
        return self.known[key]

    def __enter__(self) -> "PairScores":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        if self._file is not None:
            self._file.close()

    def add(self, scores: Mapping[bytes, float]) -> None:
        """Keeps scores of pairs."""
        self.known |= scores
        if self._file is not None:
            self._file.write(b"".join(map(_record, scores, scores.values())))
            self._file.flush()

    def _open(self, folder: Path, identity: dict[str, Any]) -> None:
        path = folder / IDENTITY
        if path.is_file():
            different = differences(identity, json.loads(path.read_text(encoding="utf-8")))
            if different:
                raise UserError(
                    f"{folder} holds scores of something else: {'; '.join(different)}. Name another folder, or delete "
                    "this one."
                )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_file(path, json.dumps(identity, indent=1))
        own = folder / f"rank-{self.rank:05d}.scores"
        if own.is_file() and own.stat().st_size % _RECORD.size:
            with open(own, "r+b") as file:
                file.truncate(own.stat().st_size // _RECORD.size * _RECORD.size)
        for file in sorted(folder.glob("rank-*.scores")):
            self.known |= _read(file)
        self._file = open(own, "ab")  # noqa: SIM115


def _record(key: bytes, score: float) -> bytes:
    return _RECORD.pack(key, score, _crc32(key, score))


def _crc32(key: bytes, score: float) -> int:
    return zlib.crc32(struct.pack("<f", score), zlib.crc32(key))


def _read(path: Path) -> dict[bytes, float]:
    """The whole records of a file; another process may be writing its last one."""
    content = path.read_bytes()
    whole = content[: len(content) // _RECORD.size * _RECORD.size]
    scores = {}
    for number, (key, score, checksum) in enumerate(_RECORD.iter_unpack(whole)):
        if _crc32(key, score) != checksum:
            raise UserError(f"Record {number} of {path} is damaged: its crc32 does not fit. Delete the file.")
        scores[key] = score
    return scores
