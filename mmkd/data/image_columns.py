"""Columns of pictures in any form, converted to a list of undecoded pictures per row."""

import hashlib
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import datasets.config
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, IterableDataset, List
from datasets.fingerprint import Hasher
from PIL import Image as PILImage

from mmkd.errors import UserError
from mmkd.files import write_file
from mmkd.seams.datasets_seam import fingerprint_of, indices_of

from .arrow import decoded_json, has_json
from .image_urls import download, is_url
from .images import UnreadableImage, content_of_text, describe, file_of, image_of_array

logger = logging.getLogger(__name__)

STORED_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""The type in which `datasets` stores a picture."""

UNDECODED = List(Image(decode=False))
"""The type of the column `images` that leaves pictures undecoded, so that a broken one does not stop reading."""


def image_column(dataset: Any) -> Any:
    """The rows with their pictures in a column `images` of lists, without decoding or copying them.

    A column `image` or `images` may hold one picture per row or a list of them, each a path, base64, a data URL,
    bytes, or a struct of bytes and path. A row without pictures gets an empty list. Data sets without such a column,
    and objects of other types, are returned unchanged. Raises UserError for a column of another type, and if both
    columns exist.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return dataset
    # The columns of a stream may be known only after its first row is read.
    names = dataset.column_names or list(next(iter(dataset), {}))
    if "image" in names and "images" in names:
        raise UserError(
            "The rows have both a column image and a column images, and only one can be meant. Remove or rename the "
            "other: dataset.remove_columns(...)."
        )
    name = next((name for name in ("image", "images") if name in names), None)
    if name is None:
        return dataset
    return _undecoded(dataset, name, "images")


def second_image_column(dataset: Any, name: str, split: str) -> Any:
    """The rows with the pictures of one more column in lists too, neither decoded nor copied, under its own name.

    Raises UserError where there is no such column, or one of another type.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return dataset
    names = dataset.column_names or list(next(iter(dataset), {}))
    if name not in names:
        raise UserError(
            f"teacher_view.images_column is {name!r}, and the {split} data has no such column; it has "
            f"{', '.join(names)}. Name the column with the teacher's pictures."
        )
    return _undecoded(dataset, name, name)


def _undecoded(dataset: Dataset | IterableDataset, name: str, ours: str) -> Dataset | IterableDataset:
    """The rows with the pictures of a column in lists, under another name perhaps."""
    return _of_rows(dataset, name, ours) if isinstance(dataset, Dataset) else _of_stream(dataset, name, ours)


def _of_rows(dataset: Dataset, name: str, ours: str) -> Dataset:
    feature = dataset.features[name]
    check_images(feature, f"The column {name!r}")
    if name == ours and feature == UNDECODED:
        return dataset
    info = deepcopy(dataset.info)
    assert info.features is not None
    info.features = Features({(ours if key == name else key): value_type for key, value_type in info.features.items()})
    info.features[ours] = UNDECODED
    table = dataset.data
    if feature != List(Image()) or name != ours:
        place = table.column_names.index(name)
        lists = image_lists(table.column(name), feature=feature)
        # A table of `datasets` records how it was made and replays that in worker processes, which cannot recreate
        # this column; a plain table is sent as it is. The other columns stay where they are, on disk or in memory.
        table = pa.table(table.columns, schema=table.table.schema.remove_metadata())
        table = table.set_column(place, ours, lists)
    return Dataset(
        table,  # pyright: ignore[reportArgumentType]
        info=info,
        split=dataset.split,
        indices_table=indices_of(dataset),
        # Without a fingerprint, `datasets` hashes the whole table.
        fingerprint=Hasher.hash(
            (fingerprint_of(dataset), "image_column", *([name] if name == ours != "images" else []))
        ),
    )


def _of_stream(dataset: IterableDataset, name: str, ours: str) -> IterableDataset:
    features = dataset.features
    feature = features[name] if features is not None else None
    if feature == List(Image()) and name == ours:
        return dataset.cast_column(name, UNDECODED)
    if feature == Image():
        dataset = dataset.cast_column(name, Image(decode=False))
    elif feature == List(Image()):
        dataset = dataset.cast_column(name, UNDECODED)
    removed = [] if name == ours else [name]
    return dataset.map(_listed, fn_kwargs={"name": name, "ours": ours}, remove_columns=removed)


def _listed(row: Mapping[str, Any], name: str, ours: str) -> dict[str, Any]:
    values = row[name]
    if values is None or values == "":
        return {ours: []}
    return {ours: values if isinstance(values, list) else [values]}


def image_lists(
    column: pa.ChunkedArray, folder: str | None = None, *, feature: Any = None, embed: bool = False
) -> pa.ChunkedArray:
    """The pictures of each row as lists of structs of bytes and path.

    A column with one picture per row gives lists of one picture or none. Relative paths start at `folder`; `embed`
    converts base64 and data URLs to bytes. Raises UserError for a column of another type.
    """
    if feature is not None and has_json(feature):
        rows = [decoded_json(value, feature) for value in column.to_pylist()]
        return pa.chunked_array([_lists_of_values(rows)])
    chunks = [_lists(_plain(chunk)) for chunk in column.chunks]
    if folder is not None or embed:
        chunks = [_with_texts(chunk, folder, embed) for chunk in chunks]
    return pa.chunked_array(chunks, type=pa.list_(STORED_IMAGE))


def download_images(dataset: Dataset) -> Dataset:
    """The rows with http(s) URLs of pictures replaced by local files, downloaded once into the datasets cache.

    A URL whose download fails stays in place: a warning is logged, and the picture of the row is unreadable.
    """
    dataset = image_column(dataset)
    if "images" not in dataset.column_names:
        return dataset
    folder = Path(datasets.config.HF_DATASETS_CACHE, "mmkd_images")
    texts = {image["path"] for row in dataset["images"] for image in row or [] if image and image["path"]}
    with ThreadPoolExecutor(16) as pool:
        places = dict(pool.map(partial(_downloaded, folder=folder), sorted(filter(is_url, texts))))
    features = dataset.features.copy()
    features["images"] = List(Image())
    return dataset.map(_placed, fn_kwargs={"places": places}, features=features, desc="Placing images")


def _downloaded(url: str, folder: Path) -> tuple[str, str]:
    path = folder / hashlib.sha256(url.encode()).hexdigest()
    if not path.is_file():
        try:
            content = download(url)
        except UserError as error:
            logger.warning("%s", error)
            return url, url
        folder.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
    return url, str(path)


def _placed(row: Mapping[str, Any], places: Mapping[str, str]) -> dict[str, Any]:
    return {
        "images": [image and {**image, "path": places.get(image["path"], image["path"])} for image in row["images"]]
    }


def image_counts(column: pa.ChunkedArray, feature: Any = None) -> list[int]:
    """The number of pictures of each row."""
    # From the lengths of the lists: conversion to Python values would copy the bytes of all pictures.
    return pc.call_function("list_value_length", [image_lists(column, feature=feature)]).to_pylist()


def counts_by_row(dataset: Dataset, name: str) -> list[int]:
    """The number of pictures of each row in a column of lists, none of which is read."""
    counts = image_counts(dataset.data.column(name))
    indices = indices_of(dataset)
    return counts if indices is None else [counts[row] for row in indices.column(0).to_pylist()]


def check_images(feature: Any, subject: str) -> None:
    """Raises UserError, beginning with `subject`, for a type that cannot hold pictures or lists of them."""
    if has_json(feature):
        return
    type_ = Features({"images": feature}).arrow_schema.field("images").type
    try:
        _lists(pa.array([], type_))
    except UserError as error:
        raise UserError(f"{subject} {error}") from error


def stored_image(value: Any) -> dict[str, Any]:
    """A picture in any form that `read_image` accepts, as `datasets` stores it, undecoded.

    Raises UnreadableImage for other values.
    """
    if isinstance(value, np.ndarray):
        value = image_of_array(value)
    if isinstance(value, PILImage.Image):
        return dict(Image().encode_example(value))
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"bytes": bytes(value), "path": None}
    if isinstance(value, (str, Path)):
        return {"bytes": None, "path": str(value)}
    if isinstance(value, Mapping):
        file = file_of(value)
        if isinstance(file, bytes):
            return {"bytes": file, "path": value.get("path")}
        return stored_image(file)
    raise UnreadableImage(f"{describe(value)} where a picture is needed")


def _lists_of_values(rows: list[Any]) -> pa.Array:
    lists = [
        [None if value is None else stored_image(value) for value in (row if isinstance(row, list) else [row])]
        for row in (row if row is not None and row != "" else [] for row in rows)
    ]
    return pa.array(lists, type=pa.list_(STORED_IMAGE))


def _plain(array: pa.Array) -> pa.Array:
    return array.storage if isinstance(array, pa.ExtensionArray) else array


def _lists(array: pa.Array) -> pa.Array:
    type_ = array.type
    if pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_) or pa.types.is_list_view(type_):
        array = array.cast(pa.list_(type_.value_type))
    if pa.types.is_list(array.type):
        counts = pc.call_function("list_value_length", [array])
        return _grouped(pc.call_function("coalesce", [counts, pa.scalar(0, pa.int32())]), _structs(array.flatten()))
    present = array.is_valid()
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        # A CSV has an empty cell where there is no picture.
        present = pc.call_function("coalesce", [pc.call_function("not_equal", [array, ""]), pa.scalar(False)])
    return _grouped(present.cast(pa.int32()), _structs(array.filter(present)))


def _grouped(counts: pa.Array, values: pa.Array) -> pa.Array:
    """Consecutive lists of `counts` values."""
    offsets = pa.concat_arrays([pa.array([0], pa.int32()), pc.call_function("cumulative_sum", [counts])])
    return pa.ListArray.from_arrays(offsets, values)


def _structs(array: pa.Array) -> pa.Array:
    """Pictures as structs of bytes and path."""
    array = _plain(array)
    type_, none = array.type, pa.nulls(len(array))
    if pa.types.is_dictionary(type_):
        return _structs(array.dictionary_decode())
    if pa.types.is_null(type_):
        return pa.nulls(len(array), STORED_IMAGE)
    if _is_text(type_):
        return _struct(none, array, array.is_null())
    if pa.types.is_binary(type_) or pa.types.is_large_binary(type_):
        return _struct(array, none, array.is_null())
    if pa.types.is_struct(type_) and {field.name for field in type_} & {"bytes", "path", "url"}:
        bytes_, path = (_field(array, name) for name in ("bytes", "path"))
        # The field `path` may hold URLs, which are recognised by their prefix; the field `bytes` may hold base64 text.
        url, text = _field(array, "url"), _field(array, "bytes") if _is_text(bytes_.type) else none
        bytes_ = none if _is_text(bytes_.type) else bytes_
        texts = [text_column.cast(pa.string()) for text_column in (text, path, url)]
        return _struct(bytes_, pc.call_function("coalesce", texts), array.is_null())
    hint = (
        ". Lists of numbers say neither their range nor their order: make them pictures with PIL.Image.fromarray"
        if pa.types.is_nested(type_) or pa.types.is_integer(type_) or pa.types.is_floating(type_)
        else ""
    )
    raise UserError(
        f"holds values of type {type_}; it must hold images or their paths (paths, base64, data URLs, bytes, or "
        f"structs with bytes or path), one per row or lists of them{hint}."
    )


def _is_text(type_: pa.DataType) -> bool:
    return pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_)


def _field(array: pa.Array, name: str) -> pa.Array:
    if array.type.get_field_index(name) < 0:
        return pa.nulls(len(array))
    return pc.call_function("struct_field", [array], pc.StructFieldOptions([name]))


def _struct(bytes_: pa.Array, path: pa.Array, missing: pa.Array) -> pa.Array:
    fields = [bytes_.cast(pa.binary()), path.cast(pa.string())]
    return pa.StructArray.from_arrays(fields, fields=list(STORED_IMAGE), mask=missing)


def _with_texts(lists: pa.Array, folder: str | None, embed: bool) -> pa.Array:
    """The lists with relative paths joined to a folder; `embed` replaces texts that encode pictures by their bytes."""
    values = lists.values
    texts = pc.call_function("struct_field", [values], pc.StructFieldOptions(["path"])).to_pylist()
    bytes_ = pc.call_function("struct_field", [values], pc.StructFieldOptions(["bytes"]))
    has_bytes = bytes_.is_valid().to_pylist()
    decoded: dict[int, bytes] = {}
    for place, text in enumerate(texts):
        if not text or has_bytes[place] or is_url(text) or ("://" in text and not text.startswith("data:")):
            continue
        try:
            content = content_of_text(text, folder)
        except UnreadableImage:
            # The reader of the row reports the error or leaves the row out.
            continue
        if isinstance(content, Path):
            texts[place] = str(content)
        elif embed:
            decoded[place], texts[place] = content, None
    if decoded:
        bytes_ = pa.array([decoded.get(place, stored) for place, stored in enumerate(bytes_.to_pylist())], pa.binary())
    structs = _struct(bytes_, pa.array(texts, pa.string()), values.is_null())
    return pa.ListArray.from_arrays(lists.offsets, structs)
