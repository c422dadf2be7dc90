"""The JSON Schemas of data recipes, made from the fields that their readers check them by."""

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from mmkd.schema import as_json_schema, fields_of

from .classification import SPLITS, ClassificationRecipe
from .columns import ROLES, MessagesColumn, TurnColumns
from .data_recipe import OUTPUT_COLUMNS, DataRecipe
from .filter_options import DataFilters

_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", dict: "object", list: "array"}
_PATHS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
_PART = {
    "type": "object",
    "properties": {
        "data": {"type": "string", "description": "A data recipe, or rows: a file, a folder, a glob or a Hub id."},
        "weight": {"type": ["number", "null"], "exclusiveMinimum": 0, "description": "Its share of the mixture."},
        "rows": {"type": ["integer", "null"], "minimum": 1, "description": "Its number of training rows."},
        "domain": {"type": ["string", "null"], "description": "What stands in the column `domain` of its rows."},
    },
    "required": ["data"],
    "additionalProperties": False,
}


def data_recipe_schema() -> dict[str, Any]:
    """What a data recipe of rows to learn from may hold."""
    messages, turns, filters = (_object(kind) for kind in (MessagesColumn, TurnColumns, DataFilters))
    messages["properties"]["role_map"] |= {"additionalProperties": {"enum": list(ROLES)}}
    filters["properties"]["min_chars"]["minimum"] = filters["properties"]["max_chars"]["minimum"] = 0
    column = {"anyOf": [{"type": "string"}, messages, turns]}
    schema = _object(DataRecipe)
    rows = {"type": "object", "additionalProperties": {"type": "integer"}}
    details: dict[str, dict[str, Any]] = {
        "rows": rows,
        "data_files": {"type": "object", "additionalProperties": _PATHS},
        "splits": _split_names(("train", "eval")),
        "columns": {
            "type": "object",
            "properties": dict.fromkeys(OUTPUT_COLUMNS, column),
            "additionalProperties": False,
        },
        "filters": filters,
        "mixture": {"type": "array", "items": _PART, "minItems": 1},
        "eval_rows": {"minimum": 1},
        "max_rows": {"minimum": 1},
    }
    for name, detail in details.items():
        schema["properties"][name] |= detail
    # The name is the file's unless given.
    schema["required"] = []
    return _whole("Data recipe of mmkd", schema) | {"anyOf": [{"required": ["source"]}, {"required": ["mixture"]}]}


def class_data_recipe_schema() -> dict[str, Any]:
    """What a data recipe of classes may hold."""
    checked = fields_of(ClassificationRecipe)
    properties: dict[str, Any] = {}
    for field in fields(ClassificationRecipe):
        if field.name in ("folder", "notes"):
            continue
        schema = as_json_schema(checked[field.name])
        if checked[field.name].optional and "type" in schema:
            schema["type"] = [schema["type"], "null"]
        properties[field.name] = {"description": _described(field), **schema}
    strings = {"type": "array", "items": {"type": "string"}}
    for name in ("class_names", "prompts"):
        properties[name] = {"description": properties[name]["description"], **strings}
    properties["prompts"]["items"] = {"type": "string", "pattern": r"\{\}"}
    properties["data_files"] |= {"type": "object", "additionalProperties": _PATHS}
    properties["splits"] |= _split_names(SPLITS)
    schema = {"type": "object", "properties": properties, "required": ["source"], "additionalProperties": False}
    one_of = [{"required": ["image"]}, {"required": ["text"]}]
    return _whole("Data recipe of classes of mmkd", schema) | {"oneOf": one_of}


def _whole(title: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"$schema": _DRAFT, "title": title, **schema}


def _object(kind: type) -> dict[str, Any]:
    """The schema of a dataclass whose metadata says what YAML may give for each field."""
    read = [field for field in fields(kind) if "yaml" in field.metadata]
    return {
        "type": "object",
        "properties": {field.name: _property(field) for field in read},
        "required": [field.name for field in read if field.default is field.default_factory is MISSING],
        "additionalProperties": False,
    }


def _property(field: "Field[Any]") -> dict[str, Any]:
    kind = field.metadata["yaml"]
    nullable = kind is int or field.default is None
    return {"description": _described(field), "type": [_TYPES[kind], "null"] if nullable else _TYPES[kind]}


def _described(field: "Field[Any]") -> str:
    default = "" if field.default in (MISSING, None, "") else f" Default: {str(field.default).lower()}."
    return " ".join(f"{field.metadata['help']}{default}".split())


def _split_names(names: tuple[str, ...]) -> dict[str, Any]:
    return {**_only(names, {"type": "string"}), "required": ["train"]}


def _only(names: tuple[str, ...], schema: dict[str, Any]) -> dict[str, Any]:
    return {"properties": dict.fromkeys(names, schema), "additionalProperties": False}
