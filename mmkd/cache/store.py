"""A teacher's scores on disk: Arrow shards, readable as a `datasets` Dataset, and a manifest that describes them.

    FOLDER/manifest.json        identity of the cache, and its finished shards
    FOLDER/token_order.npy      the ranks that ids are stored as (top_k only)
    FOLDER/head.safetensors     the teacher's head (hidden only)
    FOLDER/train/00000.arrow    `shard_rows` sequences: key, tokens, crc32, blob, images, image_tokens
    FOLDER/log.jsonl            cost of each shard and kind of device; only for reports

A shard is the unit of work, of resuming and of merging. It covers a fixed span of the data's rows, depends only on
them, and counts as finished once it is in the manifest.
"""

import hashlib
import io
import json
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value

from mmkd.errors import UserError
from mmkd.files import append_to_file, write_file

from .codec import KINDS, Codec, TokenScores
from .embedding_codec import EMBEDDINGS, EmbeddingCodec, PairEmbeddings
from .identity import file_sha256
from .manifest import Manifest, ShardEntry, Skipped, advice_on, differences, identity_differences
from .open_files import allow_open_files
from .sequence_keys import KEY_BYTES
from .side_files import codec_of
from .state_codec import StateCodec, StoredStates

SIGNAL_FEATURES = Features(
    {
        "key": Value("binary"),
        "tokens": Value("int32"),
        "crc32": Value("uint32"),
        "blob": Value("binary"),
        "images": List(Value("string")),
        "image_tokens": Value("int32"),
    }
)
LOG = "log.jsonl"


class CacheWriter:
    """The exclusive writer of a cache folder, which resumes an earlier build and repairs damaged shards.

    Raises UserError if another process is writing there, or if the folder holds another cache.
    """

    def __init__(self, folder: str | Path, manifest: Manifest, features: Features = SIGNAL_FEATURES):
        self.folder, self.manifest, self.features = Path(folder), manifest, features

    def __enter__(self) -> "CacheWriter":
        # Imported here because Windows has no such locks; training from a cache does not need them.
        try:
            import fcntl
        except ImportError as error:
            raise UserError(
                f"The cache {self.folder} cannot be written on this system, which has no POSIX file locks. Build or "
                "download it on Linux, macOS or WSL and copy the folder; it can be read anywhere."
            ) from error
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / ".lock", "w")
        except OSError as error:
            raise UserError(f"The cache {self.folder} cannot be written: {error}. Name another folder.") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise UserError(
                f"Another process is writing the cache {self.folder}. Wait for it, or split the work with --shard i/n."
            ) from error
        try:
            self._resume()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    def _resume(self) -> None:
        mine = self.manifest
        if (self.folder / "manifest.json").exists():
            existing = Manifest.read(self.folder)
            other = identity_differences(mine.identity, existing.identity)
            if not other and mine.total_rows == existing.total_rows and mine.shard_rows != existing.shard_rows:
                raise UserError(
                    f"{self.folder} was begun with cache_shard_rows: {existing.shard_rows}, and now it is "
                    f"{mine.shard_rows}. Set it back to {existing.shard_rows} to go on ({len(existing.missing())} of "
                    f"{len(existing.planned())} shards are missing), or name another folder."
                )
            plan = {"shard_rows": mine.shard_rows, "rows": mine.total_rows, "part": mine.part}
            existing_plan = {"shard_rows": existing.shard_rows, "rows": existing.total_rows, "part": existing.part}
            different = [*other, *differences({"plan": plan}, {"plan": existing_plan})]
            if different:
                raise UserError(
                    f"{self.folder} holds a cache of something else: {'; '.join(different)}. {advice_on(different)}"
                )
            self.manifest = existing
        for leftover in self.folder.rglob("*.tmp"):
            leftover.unlink()
        for split, number in damaged_shards(self.folder, self.manifest):
            del self.manifest.shards[split][number]
            span = self.manifest.span(split, number)
            for row in [row for row in self.manifest.skipped[split] if row in span]:
                del self.manifest.skipped[split][row]
        self.manifest.write(self.folder)
        log = self.folder / LOG
        if log.is_file() and log.stat().st_size > len(whole_lines(log)):
            write_file(log, whole_lines(log))

    def write(
        self,
        split: str,
        number: int,
        rows: Sequence[Mapping[str, Any]],
        skipped: Mapping[int, Skipped],
        cost: Mapping[str, Any],
    ) -> None:
        """Commits a shard: its rows without `crc32`, and the reasons for the skipped rows of its span."""
        table = sealed(rows, self.features)
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table, max_chunksize=max(1, len(table)))
        content = sink.getvalue()
        entry = ShardEntry(
            rows=len(table),
            tokens=sum(table["tokens"].to_pylist()),
            bytes=len(content),
            sha256=sha256_of(table),
            file_sha256=hashlib.sha256(content).hexdigest(),
            head=_head(content),
        )
        write_file(shard_path(self.folder, split, number), content)
        line = json.dumps({"split": split, "shard": number, "tokens": entry.tokens, **cost}) + "\n"
        append_to_file(self.folder / LOG, line.encode())
        self.manifest.shards[split][number] = entry
        self.manifest.skipped[split] |= dict(skipped)
        self.manifest.write(self.folder)

    def finish(self) -> None:
        """Writes the files that let `datasets.load_from_disk` open the folder."""
        assert not self.manifest.missing()
        describe_for_datasets(self.folder, self.manifest, self.features)


class Cache:
    """A finished cache of scores: finds sequences by their key and decodes their scores."""

    def __init__(self, folder: str | Path):
        """Raises UserError if the cache is incomplete, holds no scores, or has an unreadable shard."""
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        signal = self.manifest.identity["signal"]
        if signal["kind"] not in (*KINDS, EMBEDDINGS):
            raise UserError(
                f"{folder} holds the teacher's answers, not its scores. Train on it as data: "
                f"`data: {folder}/data.yaml`.",
                because="meaning",
            )
        missing = self.manifest.missing()
        if missing or self.manifest.part is not None:
            raise UserError(
                f"The cache {folder} is not complete: {len(missing)} of {len(self.manifest.planned())} shards are "
                "missing. Run `mmkd cache build` again to go on"
                + (", then `mmkd cache merge`." if self.manifest.part is not None else ".")
            )
        self.codec = codec_of(self.folder, self.manifest)
        shards = [(split, number) for split, number in self.manifest.planned()]
        allow_open_files(len(shards))
        self._tables = [
            read_shard(self.folder, split, number, self.manifest.shards[split][number]) for split, number in shards
        ]
        self._names = [str(shard_path(self.folder, split, number)) for split, number in shards]
        self._ends = np.cumsum([len(table) for table in self._tables])
        self.tokens = np.concatenate([np.zeros(0, np.int32), *(table["tokens"].to_numpy() for table in self._tables)])
        entries = (entry for rows in self.manifest.skipped.values() for entry in rows.values())
        self.skipped_keys = {bytes.fromhex(entry.key) for entry in entries if entry.key is not None}
        # A sorted array for binary search: a dict would need a Python object per key.
        keys = _keys(self._tables)
        self._order = np.argsort(keys, kind="stable")
        self._sorted_keys = keys[self._order]

    def __reduce__(self) -> tuple[Any, ...]:
        # For workers of a data loader: memory maps cannot be pickled, and opening them again is cheap.
        return Cache, (self.folder,)

    def __len__(self) -> int:
        return len(self.tokens)

    def find(self, key: bytes) -> int | None:
        """The row of the sequence with this key, or None."""
        if not len(self):
            return None
        # Numpy compares void values as bytes, in the order of the sort.
        place = int(np.searchsorted(self._sorted_keys, np.void(key)))
        if place == len(self) or self._sorted_keys[place].tobytes() != key:
            return None
        return int(self._order[place])

    def scores(self, row: int) -> TokenScores:
        """The scores of a sequence. Raises UserError if its bytes are damaged."""
        assert isinstance(self.codec, Codec)
        return self._decoded(self.codec, row)

    def states(self, row: int) -> StoredStates:
        """The hidden states of a sequence, in a cache of those. Raises UserError if its bytes are damaged."""
        assert isinstance(self.codec, StateCodec)
        return self._decoded(self.codec, row)

    def embeddings(self, row: int) -> PairEmbeddings:
        """The embeddings of a pair, in a cache of those. Raises UserError if its bytes are damaged."""
        assert isinstance(self.codec, EmbeddingCodec)
        return self._decoded(self.codec, row)

    def _decoded(self, codec: Any, row: int) -> Any:
        blob, tokens = self._blob(row)
        try:
            return codec.decode(blob, tokens)
        except (ValueError, IndexError, OSError, OverflowError, MemoryError, struct.error) as error:
            # Its bytes are those that were written, so that the manifest says other things of them than its writer.
            raise UserError(
                f"The rows of {self.folder} are not what its manifest says: {type(error).__name__}: {error}. Build "
                "the cache again, or download it again."
            ) from error

    def _blob(self, row: int) -> tuple[memoryview, int]:
        """The bytes of a sequence, and how many supervised tokens it has."""
        shard = int(np.searchsorted(self._ends, row, side="right"))
        table = self._tables[shard]
        place = row - (int(self._ends[shard - 1]) if shard else 0)
        blob, tokens = table["blob"].chunk(0)[place].as_buffer(), int(self.tokens[row])
        key = table["key"].chunk(0)[place].as_buffer()
        if _crc32(key, tokens, blob) != table["crc32"].chunk(0)[place].as_py():
            raise UserError(
                f"Row {place} of {self._names[shard]} is damaged: its crc32 does not fit. Run `mmkd cache build` with "
                "the recipe that made it, which repairs just that shard; if it came from the Hub, delete the folder."
            )
        return memoryview(blob), tokens


def shard_path(folder: Path, split: str, number: int) -> Path:
    """The path of a shard."""
    return folder / split / f"{number:05d}.arrow"


def sealed(rows: Sequence[Mapping[str, Any]], features: Features) -> pa.Table:
    """Rows with their crc32, as a table of one batch."""
    complete = [{**row, "crc32": _crc32(row["key"], row["tokens"], _payload(row))} for row in rows]
    if "blob" in features:
        return pa.Table.from_pylist(complete, features.arrow_schema).combine_chunks()
    # Messages with different parts, and images, are types of `datasets`, which Arrow cannot build.
    columns = {name: [row[name] for row in complete] for name in features}
    return Dataset.from_dict(columns, features=features).data.table.combine_chunks()


def sha256_of(table: pa.Table) -> str:
    """The checksum of a shard's rows, independent of the file format."""
    digest = hashlib.sha256()
    for row in table.to_pylist():
        row.pop("crc32")
        digest.update(row.pop("key") + row.pop("tokens").to_bytes(4, "little"))
        digest.update(row.pop("blob", b""))
        digest.update(json.dumps(row, sort_keys=True, default=_hex).encode())
    return digest.hexdigest()


def read_shard(folder: Path, split: str, number: int, entry: ShardEntry) -> pa.Table:
    """A shard, memory-mapped. Raises UserError if it is missing, truncated or differs from the manifest."""
    path = shard_path(folder, split, number)
    try:
        with pa.memory_map(str(path)) as source:
            if source.size() != entry.bytes:
                raise UserError(f"it has {source.size():,} bytes instead of {entry.bytes:,}")
            # If these bytes are damaged, Arrow crashes or allocates all memory.
            length, checksum = entry.head
            if zlib.crc32(source.read_buffer(length)) != checksum:
                raise UserError("its description of the rows is damaged")
            source.seek(0)
            table = pa.ipc.open_stream(source).read_all().combine_chunks()
            table.validate(full=True)
        if len(table) != entry.rows:
            raise UserError(f"it has {len(table):,} rows instead of {entry.rows:,}")
        if (
            any(len(key) != KEY_BYTES for key in table["key"].to_pylist())
            or min(table["tokens"].to_pylist(), default=0) < 0
        ):
            raise UserError("keys or token counts are damaged")
    except (OSError, ValueError) as error:
        raise UserError(
            f"The shard {path} cannot be read: {error}. Run `mmkd cache build` with the recipe that made it, which "
            "repairs just that shard; if it came from the Hub, delete the folder."
        ) from error
    return table


def damaged_shards(folder: Path, manifest: Manifest) -> Iterable[tuple[str, int]]:
    """The finished shards whose file is missing or changed. Reads all files."""
    damaged = []
    for split, entries in manifest.shards.items():
        for number, entry in entries.items():
            path = shard_path(folder, split, number)
            if not path.is_file() or file_sha256(path) != entry.file_sha256:
                damaged.append((split, number))
    return damaged


def whole_lines(log: Path) -> bytes:
    """The complete lines of a log, without a last line that a killed process left unfinished; empty without a log."""
    content = log.read_bytes() if log.is_file() else b""
    return content[: content.rfind(b"\n") + 1]


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The costs of shards; a shard that was built twice is listed twice. Raises UserError for a damaged line."""
    entries = []
    for number, line in enumerate(whole_lines(folder / LOG).splitlines(), start=1):
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            raise UserError(
                f"Line {number} of {folder / LOG} is damaged ({error}). It decides nothing: delete the line."
            ) from error
    return entries


def describe_for_datasets(folder: Path, manifest: Manifest, features: Features) -> None:
    """Writes the files that `datasets.load_from_disk` requires."""
    info = json.dumps(
        {"features": features.to_dict(), "citation": "", "description": "", "homepage": "", "license": ""}
    )
    for split, entries in manifest.shards.items():
        files = [{"filename": shard_path(folder, split, number).name} for number in sorted(entries)]
        fingerprint = hashlib.sha256("".join(entries[n].sha256 for n in sorted(entries)).encode()).hexdigest()[:16]
        state = {
            "_data_files": files,
            "_fingerprint": fingerprint,
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": split,
        }
        write_file(folder / split / "state.json", json.dumps(state).encode())
        write_file(folder / split / "dataset_info.json", info.encode())
    write_file(folder / "dataset_dict.json", json.dumps({"splits": list(manifest.shards)}).encode())


def _head(content: bytes) -> tuple[int, int]:
    """Length and crc32 of a stream up to the bytes of its only batch of rows, if it has one."""
    messages = list(pa.ipc.MessageReader.open_stream(content))
    # The end marker of a stream, after the batch, has eight bytes.
    length = len(content) - 8 - messages[1].body.size if len(messages) > 1 else len(content)
    return length, zlib.crc32(content[:length])


def _payload(row: Mapping[str, Any]) -> bytes:
    if "blob" in row:
        return row["blob"]
    rest = {key: value for key, value in row.items() if key not in ("key", "tokens", "crc32")}
    return json.dumps(rest, sort_keys=True, default=_hex).encode()


def _hex(value: Any) -> str:
    return bytes(value).hex()


def _crc32(key: Any, tokens: int, payload: Any) -> int:
    return zlib.crc32(payload, zlib.crc32(tokens.to_bytes(4, "little"), zlib.crc32(key)))


def _keys(tables: list[pa.Table]) -> np.ndarray:
    joined = b"".join(key for table in tables for key in table["key"].to_pylist())
    return np.frombuffer(joined, dtype=f"V{KEY_BYTES}")
