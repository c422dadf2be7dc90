"""Rows of WebDataset shards: files of a tar archive whose names are equal up to the first dot are one row."""

import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
from datasets import Features, Image, List

from mmkd.errors import UserError

from .images import IMAGE_SUFFIXES
from .json_rows import Shape, decoded_text, parsed_text, rows_table

_TEXTS = ("txt", "text", "caption")
_LABEL = "cls"
_BATCH = 64
"""Rows of a table: pictures are large."""


@dataclass
class _Row:
    """The files of one row."""

    key: str
    images: list[bytes | None] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    """The endings of files that are no picture, text, label or JSON."""


def shard_features(files: Iterable[tuple[str, str]]) -> Features:
    """The types of all rows; `files` are (path, name in messages). Raises UserError for shards without rows."""
    shape, names, most, images = Shape(), [], 0, False
    for path, name in files:
        names.append(name)
        for row in _rows(path, name, pictures=False):
            most, images = max(most, len(row.images)), images or bool(row.images)
            shape.see(_columns(row, most))
    if not shape.fields and not images:
        raise UserError(f"{', '.join(names)}: there are no rows in it; files with one name up to the dot are a row.")
    pictures: dict[str, Any] = {"images": List(Image())} if most > 1 else {"image": Image()} if images else {}
    texts = {name: value.feature() for name, value in shape.fields.items() if name not in pictures}
    return Features({**texts, **pictures})


def shard_notes(files: Iterable[tuple[str, str]]) -> str:
    """What is left out of the rows, in a sentence; empty for nothing."""
    unread: Counter[str] = Counter()
    for path, name in files:
        for row in _rows(path, name, pictures=False):
            unread.update(row.unread)
    kinds = ", ".join(f"{count} .{ending}" for ending, count in unread.most_common())
    return f"Not read in the archives: {kinds}." if unread else ""


def shard_tables(path: str, name: str, features: Features) -> Iterator[pa.Table]:
    """The rows of a shard as tables of these types. Raises UserError for broken files in it."""
    batch: list[_Row] = []
    for row in _rows(path, name, pictures=True):
        batch.append(row)
        if len(batch) == _BATCH:
            yield _table(batch, name, features)
            batch = []
    if batch:
        yield _table(batch, name, features)


def _table(batch: list[_Row], name: str, features: Features) -> pa.Table:
    several = "images" in features and features["images"] == List(Image())
    others = Features({key: value for key, value in features.items() if key not in ("image", "images")})
    most = 2 if several else 1
    block = [(f"row {row.key}", {key: _columns(row, most).get(key) for key in others}) for row in batch]
    columns = dict(zip(others, rows_table(block, name, others).columns, strict=True)) if len(others) else {}
    for key in features.keys() - others.keys():
        stored = [[{"bytes": image, "path": None} for image in row.images] for row in batch]
        values: list[Any] = stored if several else [row[0] if row else None for row in stored]
        columns[key] = pa.array(values, features.arrow_schema.field(key).type)
    return pa.table({key: columns[key] for key in features}, schema=features.arrow_schema)


def _columns(row: _Row, most: int) -> dict[str, Any]:
    """The values of a row but its pictures; a text beside a picture is its caption."""
    values = dict(row.values)
    if "text" in values and row.images and "caption" not in values:
        values["caption"] = values.pop("text")
    # A row of JSON names its own picture by the file that is in the archive.
    return {key: value for key, value in values.items() if key not in ("image", "images") or not row.images}


def _rows(path: str, name: str, *, pictures: bool) -> Iterator[_Row]:
    """The rows of a shard; without `pictures`, None stands for their bytes."""
    row: _Row | None = None
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                file = PurePosixPath(member.name)
                if not member.isfile() or file.name.startswith(".") or "." not in file.name:
                    continue
                stem, _, ending = file.name.partition(".")
                key = str(file.with_name(stem))
                if row is not None and row.key != key:
                    yield row
                    row = None
                row = row or _Row(key)
                _add(row, ending.lower(), archive, member, name, pictures)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{name}: this is no readable tar archive ({error}). Copy or download it again.") from error
    if row is not None:
        yield row


def _add(row: _Row, ending: str, archive: tarfile.TarFile, member: tarfile.TarInfo, name: str, pictures: bool) -> None:
    kind = ending.rpartition(".")[2]
    is_image = f".{kind}" in IMAGE_SUFFIXES
    if not is_image and kind not in (*_TEXTS, _LABEL, "json"):
        row.unread.append(ending)
        return
    if is_image and not pictures:
        row.images.append(None)
        return
    file = archive.extractfile(member)
    assert file is not None
    content = file.read()
    if is_image:
        row.images.append(content)
        return
    where = f"{name}: {member.name}"
    text = decoded_text(content, where)
    if kind == "json":
        value = parsed_text(text, where)
        values = value if isinstance(value, dict) else {"json": value}
    elif kind == _LABEL:
        values = {"label": int(text) if text.strip().isdecimal() else text.strip()}
    else:
        prefix = ending.partition(".")[0]
        values = {"text" if prefix == kind else prefix: text}
    twice = next((key for key in values if key in row.values and row.values[key] != values[key]), None)
    if twice is not None:
        raise UserError(f"{where}: the row {row.key} has {twice!r} twice, in this file and in another; remove one.")
    row.values |= values
