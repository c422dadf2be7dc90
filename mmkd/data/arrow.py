"""Rows of data sets as Arrow stores them: nothing is copied that need not be, and no image is decoded."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Json, LargeList, List

BATCH = 1000
"""Rows read at a time: enough to hide the cost of a batch, few enough for rows with images."""


def read_rows(dataset: Dataset, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows as plain Python values, images undecoded."""
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=BATCH):
        yield from plain_rows(table, dataset.features)


def plain_rows(table: pa.Table, features: Features) -> list[dict[str, Any]]:
    """The rows of a table as plain Python values."""
    columns = {}
    for name in table.column_names:
        values = table.column(name).to_pylist()
        feature = features[name]
        columns[name] = [decoded_json(value, feature) for value in values] if has_json(feature) else values
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def has_json(feature: Any) -> bool:
    """Whether values of a type hold JSON text somewhere."""
    if isinstance(feature, dict):
        return any(map(has_json, feature.values()))
    if isinstance(feature, List | LargeList):
        return has_json(feature.feature)
    return isinstance(feature, Json)


def decoded_json(value: Any, feature: Any) -> Any:
    """The value with its JSON read: `datasets` stores objects whose keys differ from row to row as JSON text."""
    if value is None:
        return None
    if isinstance(feature, Json):
        return json.loads(value)
    if isinstance(feature, List | LargeList):
        return [decoded_json(item, feature.feature) for item in value]
    if isinstance(feature, dict):
        return {key: decoded_json(item, feature[key]) for key, item in value.items()}
    return value


def is_struct_list(feature: Any) -> bool:
    """Whether a column holds lists of objects with the same keys."""
    return isinstance(feature, List | LargeList) and isinstance(feature.feature, dict)


def storage(type_: pa.DataType) -> pa.DataType:
    """The type with JSON as the text it is stored as: Arrow cannot build extension types from Python values."""
    if isinstance(type_, pa.BaseExtensionType):
        return type_.storage_type
    if pa.types.is_list(type_):
        return pa.list_(storage(type_.value_type))
    if pa.types.is_struct(type_):
        return pa.struct([(field.name, storage(field.type)) for field in type_])
    return type_


def image_lists(column: pa.ChunkedArray, folder: str | None = None) -> pa.ChunkedArray:
    """Lists of images: a column that has one image a row gets lists of one, or of none. Paths may be strings."""
    nested = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    paths = pa.types.is_string(column.type.value_type if nested else column.type)
    if folder is not None and paths:
        rows = [row if nested else [row] for row in column.to_pylist()]
        joined = [[str(Path(folder, path)) for path in row or [] if path] for row in rows]
        return pa.chunked_array([pa.array(joined, type=pa.list_(pa.string()))])
    if nested:
        return column
    chunks = []
    for chunk in column.chunks:
        starts = [0, *itertools.accumulate(int(present) for present in chunk.is_valid().to_pylist())]
        chunks.append(pa.ListArray.from_arrays(pa.array(starts, pa.int32()), chunk.drop_null()))
    return pa.chunked_array(chunks, type=pa.list_(column.type))


def image_counts(column: pa.ChunkedArray) -> list[int]:
    """How many images each row has."""
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        # By the lengths: as Python values, the bytes of all pictures would be copied.
        return [count or 0 for count in pc.call_function("list_value_length", [column]).to_pylist()]
    return [int(present) for present in column.is_valid().to_pylist()]
