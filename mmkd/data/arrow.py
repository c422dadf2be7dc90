"""Rows of data sets in Arrow: read without unnecessary copies and without decoding images."""

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, Json, LargeList, List

from .json_rows import parse_json

BATCH = 1000
"""Rows read at a time: enough to make the cost of a batch negligible, few enough for rows with images."""


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
    """Whether a type contains JSON text at any depth."""
    if isinstance(feature, dict):
        return any(map(has_json, feature.values()))
    if isinstance(feature, List | LargeList):
        return has_json(feature.feature)
    return isinstance(feature, Json)


def decoded_json(value: Any, feature: Any) -> Any:
    """The value with its JSON parsed: `datasets` stores objects whose keys differ between rows as JSON text."""
    if value is None:
        return None
    if isinstance(feature, Json):
        return parse_json(value)
    if isinstance(feature, List | LargeList):
        return [decoded_json(item, feature.feature) for item in value]
    if isinstance(feature, dict):
        return {key: decoded_json(item, feature[key]) for key, item in value.items()}
    return value


def encoded_json(value: Any, feature: Any) -> Any:
    """The value with its JSON as text for storage, with all digits of numbers; `datasets` itself would write ten."""
    if value is None:
        return None
    if isinstance(feature, Json):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(feature, List | LargeList):
        return [encoded_json(item, feature.feature) for item in value]
    return value


def is_struct_list(feature: Any) -> bool:
    """Whether a column holds lists of objects with the same keys."""
    return isinstance(feature, List | LargeList) and isinstance(feature.feature, dict)


def storage(type_: pa.DataType) -> pa.DataType:
    """The type with JSON replaced by text, as Arrow cannot build arrays of extension types from Python values."""
    if isinstance(type_, pa.BaseExtensionType):
        return type_.storage_type
    if pa.types.is_list(type_):
        return pa.list_(storage(type_.value_type))
    if pa.types.is_struct(type_):
        return pa.struct([(field.name, storage(field.type)) for field in type_])
    return type_
