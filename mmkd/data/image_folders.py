"""Rows of folders of pictures: the class is the folder's name, or a metadata file has a row for each picture."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, Image, List, Value

from mmkd.errors import UserError
from mmkd.units import with_noun

from .images import IMAGE_SUFFIXES
from .table_files import read_table_files

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Files in a folder of pictures with a row for each picture."""

_NAMES = {"file_name": "image", "file_names": "images"}
"""The column with the files of a row -> the column with its pictures."""


def read_image_folder(name: str, folders: Sequence[Path]) -> Dataset:
    """The pictures below folders in a column `image`, with the columns of their metadata or a `label`.

    What is left out of them stands in `info.description`.
    Raises UserError for folders without pictures, and for metadata that does not fit them.
    """
    parts = [_read(name, folder) for folder in folders]
    columns = {tuple(sorted(part.column_names)) for part in parts}
    if len(columns) > 1:
        listed = " and ".join(", ".join(names) for names in sorted(columns))
        raise UserError(f"{name}: the folders of one split have different columns: {listed}.")
    return datasets.concatenate_datasets(parts)


def _read(name: str, folder: Path) -> Dataset:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_hidden(path, folder)]
    pictures = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    metadata = [path for path in files if path.name in METADATA]
    if metadata:
        parts = [_described(name, path, folder) for path in metadata]
        rows = datasets.concatenate_datasets(parts)
        used = {path for part in parts for path in _paths_of(part)}
        unused = [path for path in pictures if str(path) not in used]
        if unused:
            rows.info.description = (
                f"{with_noun(len(unused), 'picture')} left out, not in {metadata[0].name}, such as {unused[0]}."
            )
        return rows
    if not pictures:
        raise UserError(f"{name}: there are no pictures in {folder}; they end in {', '.join(IMAGE_SUFFIXES)}.")
    classed = [path for path in pictures if path.parent != folder]
    if not classed:
        return _dataset({"image": [str(path) for path in pictures]}, {"image": Image()})
    columns = {"image": [str(path) for path in classed], "label": [path.parent.name for path in classed]}
    rows = _dataset(columns, {"image": Image(), "label": Value("string")})
    if len(classed) < len(pictures):
        beside = with_noun(len(pictures) - len(classed), "picture")
        rows.info.description = f"{beside} left out, in {folder} itself and not in the folder of a class."
    return rows


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in path.relative_to(folder).parts)


def _dataset(columns: dict[str, Any], features: dict[str, Any]) -> Dataset:
    return Dataset.from_dict(columns, features=Features(features))


def _described(name: str, path: Path, folder: Path) -> Dataset:
    """The rows of a metadata file, with pictures for the names of files."""
    rows: Any
    if path.suffix == ".parquet":
        rows = Dataset.from_parquet(str(path))
    else:
        rows = read_table_files("csv" if path.suffix == ".csv" else "json", [str(path)], "train")
    named = next((column for column in _NAMES if column in rows.column_names), None)
    if named is None or (_NAMES[named] in rows.column_names):
        problem = f"also has a column {_NAMES[named]}" if named else "has no column file_name"
        raise UserError(
            f"{name}: {path} {problem}. Each row names its picture in file_name (or several in a list, file_names), "
            f"relative to {path.parent}. Its columns are {', '.join(rows.column_names)}."
        )
    values: list[Any] = rows[named][:]
    places = [
        [str(path.parent / file) for file in value] if isinstance(value, list) else value and str(path.parent / value)
        for value in values
    ]
    outside = next((file for file in _flat(places) if not _is_below(file, folder)), None)
    if outside is not None:
        raise UserError(
            f"{name}: {path} names the picture {outside}, which is not in {folder}. A folder of pictures brings its "
            "own; move the picture there, or name it in a column image of a file of rows (`source: json`)."
        )
    absent = next((file for file in _flat(places) if not Path(file).is_file()), None)
    if absent is not None:
        raise UserError(
            f"{name}: {path} names the picture {absent}, which is not there. Correct the row or remove it."
        )
    ours = _NAMES[named]
    type_: Any = Image() if ours == "image" else List(Image())
    pictures = _dataset({ours: places}, {ours: type_})
    others = rows.remove_columns(named)
    return datasets.concatenate_datasets([others, pictures], axis=1) if others.column_names else pictures


def _is_below(file: str, folder: Path) -> bool:
    # As it is written: links in a folder are its owner's, and often lead to a disk with more room.
    return Path(os.path.abspath(file)).is_relative_to(os.path.abspath(folder))


def _flat(places: Sequence[Any]) -> list[str]:
    return [file for place in places for file in (place if isinstance(place, list) else [place]) if file]


def _paths_of(rows: Dataset) -> list[str]:
    column = "image" if "image" in rows.column_names else "images"
    undecoded = Image(decode=False) if column == "image" else List(Image(decode=False))
    values = rows.select_columns([column]).cast_column(column, undecoded)[column][:]
    return [image["path"] for value in values for image in (value if isinstance(value, list) else [value]) if image]
