"""The manifest of a cache: its identity, its finished shards, and a checksum over the manifest."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmkd.errors import UserError
from mmkd.files import write_file
from mmkd.precision import NATIVE_BF16

FORMAT = 1
"""The version of the format. Raise it when the bytes of a cache change their meaning, or equal scores their bytes."""

NAME = "manifest.json"

RECORDED_ONLY = ("mmkd", "batch_tokens")
"""The fields of an identity that may change when a build is continued. The version of mmkd, since `FORMAT` tells
whether two versions write the same bytes. The size of a batch, since padding changes a teacher's numbers only by
rounding, as the batches of a live teacher do (and sampled answers, whose random numbers depend on the batch, are draws
either way)."""

_PARTICULARS = re.compile(r"'[^']*'|\((path|URL|base64|data URL) [^()]*(\([^()]*\))?\)|0x[0-9a-f]+|[0-9]+")


_MOST, _MOST_SHARDS = 1 << 48, 10_000_000
"""Rows and shards of the largest cache."""


@dataclass(frozen=True)
class ShardEntry:
    """One finished shard."""

    rows: int
    tokens: int
    bytes: int
    sha256: str
    """Over its rows and not its container, so that a Parquet copy has the same checksum."""
    file_sha256: str
    head: tuple[int, int]
    """Length and crc32 of the bytes before the rows, which Arrow reads without validation."""


@dataclass(frozen=True)
class Skipped:
    """A row without an answer, with its key if the row could be read."""

    reason: str
    key: str | None = None


@dataclass
class Manifest:
    """The contents of a cache. `identity` describes everything that determines its rows, as a tree of plain values."""

    identity: dict[str, Any]
    shard_rows: int
    total_rows: dict[str, int]
    """Split -> number of rows of the data that the cache covers, including skipped rows."""
    shards: dict[str, dict[int, ShardEntry]] = field(default_factory=dict)
    """Split -> shard number -> entry."""
    skipped: dict[str, dict[int, Skipped]] = field(default_factory=dict)
    """Split -> row -> the reason why the teacher gave no answer."""
    part: tuple[int, int] | None = None
    """(i, n) when this is the i-th of n parts of a build."""

    def __post_init__(self) -> None:
        for split in self.total_rows:
            self.shards.setdefault(split, {})
            self.skipped.setdefault(split, {})

    def planned(self) -> list[tuple[str, int]]:
        """The shards of this cache, or of this part of it: (split, number)."""
        everything = [
            (split, number) for split, rows in self.total_rows.items() for number in range(-(-rows // self.shard_rows))
        ]
        return everything if self.part is None else everything[self.part[0] :: self.part[1]]

    def missing(self) -> list[tuple[str, int]]:
        """The planned shards that are not finished."""
        return [(split, number) for split, number in self.planned() if number not in self.shards[split]]

    def span(self, split: str, number: int) -> range:
        """The rows of the data that a shard covers."""
        start = number * self.shard_rows
        return range(start, min(start + self.shard_rows, self.total_rows[split]))

    def rows(self) -> int:
        """The number of rows of the data that this cache, or this part of it, covers."""
        return sum(len(self.span(*shard)) for shard in self.planned())

    def skipped_rows(self) -> int:
        """The number of these rows without an answer of the teacher."""
        return sum(map(len, self.skipped.values()))

    def skipped_reasons(self) -> list[tuple[int, str]]:
        """The reasons for skipped rows, as (number of rows, reason of the first of them), most frequent first."""
        by_kind: dict[str, list[str]] = {}
        for rows in self.skipped.values():
            for _, entry in sorted(rows.items()):
                # Reasons that differ only in numbers, quotes or the description of a picture are counted as one.
                by_kind.setdefault(_PARTICULARS.sub("", entry.reason), []).append(entry.reason)
        return sorted(((len(reasons), reasons[0]) for reasons in by_kind.values()), key=lambda pair: -pair[0])

    def skipped_summary(self) -> str:
        """The skipped rows and their reasons in one line."""
        count, rows = self.skipped_rows(), self.rows()
        reasons = "; ".join(f"{times:,} times: {reason}" for times, reason in self.skipped_reasons()[:3])
        return f"{count:,} of {rows:,} rows ({count / rows:.1%}) have no answer of the teacher's: {reasons}"

    def write(self, folder: Path) -> None:
        """Replaces the folder's manifest atomically."""
        # Sorted as numbers: JSON turns keys into text, which would sort 10 before 9.
        entries = {
            name: {
                split: {str(number): vars(entry) for number, entry in sorted(numbered.items())}
                for split, numbered in getattr(self, name).items()
            }
            for name in ("shards", "skipped")
        }
        content = {**vars(self), **entries, "format": FORMAT}
        content["checksum"] = _checksum(content)
        # Without indentation, which would take most of the time: the manifest is written after every shard.
        write_file(folder / NAME, json.dumps(content).encode())

    @staticmethod
    def read(folder: Path) -> "Manifest":
        """The manifest of a folder. Raises UserError if it is missing, edited, damaged or from a newer mmkd."""
        path = folder / NAME
        if not path.is_file():
            raise UserError(f"{folder} is no teacher cache: it has no {NAME}. Make one with `mmkd cache build`.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}); build the cache again.") from error
        format_number = content.pop("format", None) if isinstance(content, dict) else None
        if format_number != FORMAT:
            raise UserError(
                f"{path} has format {format_number}, this mmkd reads {FORMAT}; install the version that wrote it."
            )
        if content.pop("checksum", None) != _checksum({**content, "format": FORMAT}):
            raise UserError(
                f"{path} was edited: its checksum does not fit. It says what the rows mean, so restore it, or build "
                "the cache again in another folder."
            )
        try:
            return _manifest_of(content)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise UserError(
                f"{path} is not mmkd's: {type(error).__name__}: {error}. Build the cache again, or download it again."
            ) from error


def _manifest_of(content: dict[str, Any]) -> Manifest:
    """The manifest of what its file holds. Raises ValueError and its like for what no mmkd has written."""
    shards = {
        split: {int(number): _entry_of(entry) for number, entry in entries.items()}
        for split, entries in content.pop("shards").items()
    }
    skipped = {
        split: {int(row): Skipped(**entry) for row, entry in rows.items()}
        for split, rows in content.pop("skipped").items()
    }
    part = content.pop("part")
    manifest = Manifest(**content, shards=shards, skipped=skipped, part=None if part is None else tuple(part))
    _check(manifest)
    return manifest


def _entry_of(entry: Mapping[str, Any]) -> ShardEntry:
    length, checksum = entry["head"]
    made = ShardEntry(**{**entry, "head": (length, checksum)})
    numbers = (made.rows, made.tokens, made.bytes, length, checksum)
    if any(type(number) is not int or number < 0 for number in numbers) or length > made.bytes:
        raise ValueError(f"a shard of the sizes {numbers}")
    if not all(isinstance(text, str) for text in (made.sha256, made.file_sha256)):
        raise ValueError("a shard without checksums")
    return made


def _check(manifest: Manifest) -> None:
    """Raises ValueError for a manifest that contradicts itself.

    Names of splits become paths, and numbers of shards files to look for; it may come from an untrusted repository.
    """
    rows, size, part = manifest.total_rows, manifest.shard_rows, manifest.part
    if not all(split.isidentifier() for split in rows) or not set(manifest.shards) | set(manifest.skipped) <= set(
        rows
    ):
        raise ValueError(f"splits of the names {[*rows, *manifest.shards, *manifest.skipped]}")
    counts = (size, *rows.values(), *(part or ()))
    if any(type(count) is not int or not 0 <= count < _MOST for count in counts) or size < 1:
        raise ValueError(f"numbers of rows {counts}")
    if part is not None and not (len(part) == 2 and 0 <= part[0] < part[1]):
        raise ValueError(f"a part {part}")
    if sum(-(-count // size) for count in rows.values()) > _MOST_SHARDS:
        raise ValueError(f"more than {_MOST_SHARDS:,} shards")
    for split, entries in manifest.shards.items():
        if any(not 0 <= number < -(-rows[split] // size) for number in entries):
            raise ValueError(f"shards of {split} that its rows do not fill")
    if manifest.identity.get("job") == "verify":
        # Verdicts on answers say nothing that a student reads.
        return
    signal = manifest.identity["signal"]
    if not isinstance(signal, dict) or not isinstance(signal["kind"], str):
        raise ValueError("an identity without a kind of signal")


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The fields in which two identities differ: `data.fingerprint: 'a' here, 'b' there`."""
    lines = []
    for key in sorted({*ours, *theirs}):
        left, right = ours.get(key), theirs.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            lines += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            lines.append(f"{prefix}{key}: {left!r} here, {right!r} there")
    return lines


def identity_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The fields that make two identities different caches; the name of a teacher with equal weights is not one."""
    ignored = [f"{name}: " for name in RECORDED_ONLY]
    if ours["teacher"]["weights"] and theirs["teacher"]["weights"]:
        ignored += ["teacher.name: ", "teacher.revision: "]
    return [line for line in differences(ours, theirs) if not line.startswith(tuple(ignored))]


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def advice_on(different: Sequence[str]) -> str:
    """Advice for the user about a folder that holds another cache."""
    if len(different) == 1 and different[0].startswith("teacher.dtype: "):
        return (
            "A cache is of one type. Set teacher_dtype to the type it has, or name another folder. Where this CPU "
            f"only emulates that type, continue on a machine like the first, or set {NATIVE_BF16}=1 to emulate it."
        )
    if len(different) == 1 and different[0].startswith("signal.boundaries: "):
        return (
            "With chunks: merge or unbiased a cache of log-probs keeps the probability of a word's end, too. Name "
            "another folder, or set chunks as it was when this cache was begun."
        )
    return "Name another folder, or delete this one."
