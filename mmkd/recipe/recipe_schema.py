"""The JSON Schema of recipes, made from the fields that the parser reads them by."""

import json
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

from mmkd.schema import as_json_schema, fields_of
from mmkd.training.feature_terms import FeatureTerm
from mmkd.training.method import BASELINE_METHOD

from .arguments import VIEW, RunArguments
from .key_format import Key, default_text
from .key_groups import GROUPS
from .key_reference import keys_of
from .launch_keys import launch_options

DRAFT = "https://json-schema.org/draft/2020-12/schema"

_REFUSED = ("fsdp", "fsdp_config")
_NULL = {"type": "null"}
# What editors show and no check reads.
_SHOWN = ("description", "default", "deprecated")


def recipe_schema(methods: Sequence[str]) -> dict[str, Any]:
    """What a recipe of one of these methods may hold, with a description of every key.

    A stage's keys are checked by its own method where it names one, and otherwise by what any method takes.
    """
    keys = {method: [key for key in keys_of(method) if key.field is not None] for method in methods}
    specs = {method: {key.name: _nullable(key) for key in keys[method]} for method in methods}
    sets = _grouped(specs)
    shared = sets.pop(tuple(methods), {})
    defs = {_name_of(owners): {"properties": names} for owners, names in sets.items()}
    any_method = _of_any(specs.values(), shared)
    launch = {name: {"description": _plain(action.help)} for name, action in _launch_keys(any_method | shared).items()}
    names = {"enum": sorted({*shared, *any_method, *launch, *_own_properties({})})}
    refs = {
        method: [{"$ref": f"#/$defs/{_name_of(owners)}"} for owners in sets if method in owners] for method in methods
    }
    required = {method: {"properties": _not_null(keys[method], any_method)} for method in methods}
    stage = {
        "type": "object",
        "description": "The keys of this stage alone; null takes a key away.",
        "propertyNames": names,
        "allOf": [
            {"$ref": "#/$defs/every_method"},
            *_by_method(refs),
            {"if": {"not": {"required": ["method"]}}, "then": {"$ref": "#/$defs/any_method"}},
        ],
        "unevaluatedProperties": False,
    }
    return {
        "$schema": DRAFT,
        "title": "Recipe of mmkd",
        "description": "One run: mmkd-train RECIPE.yaml",
        "type": "object",
        "propertyNames": names,
        "properties": _own_properties({"$ref": "#/$defs/stage"}),
        "allOf": [
            {"$ref": "#/$defs/every_method"},
            {"properties": _not_null(keys[methods[0]], shared)},
            *_by_method({method: [*refs[method], required[method]] for method in methods}),
            {
                "if": {"required": ["stages"]},
                # What the stages share may be a key of any of their methods.
                "then": {"$ref": "#/$defs/any_method"},
                "else": {"required": _required(keys.values())},
            },
            {"if": {"required": ["accelerate_config"]}, "then": {"$ref": "#/$defs/accelerate_launch"}},
        ],
        "unevaluatedProperties": False,
        "$defs": {
            "every_method": {"properties": shared},
            **defs,
            "any_method": {"properties": any_method},
            "accelerate_launch": {"properties": launch},
            "stage": stage,
        },
    }


def _own_properties(stage: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that a recipe has besides those of its method."""
    descriptions = {key.name: key.help for key in keys_of(BASELINE_METHOD) if key.field is None}
    schemas: dict[str, dict[str, Any]] = {
        "stages": {"type": "object", "minProperties": 1, "additionalProperties": dict(stage)},
        "schedule": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "string"}]},
        "accelerate_config": {"type": "string"},
        "env": {"type": "object", "additionalProperties": {"type": ["string", "number"]}},
    }
    return {name: {"description": descriptions[name], **schema} for name, schema in schemas.items()}


def _nullable(key: Key) -> dict[str, Any]:
    """What a key may hold, or null, which takes a key away from a stage."""
    assert key.field is not None
    schema = {"const": ""} if key.name in _REFUSED else _values(key)
    described: dict[str, Any] = {"description": _description(key)}
    if key.unused:
        described["deprecated"] = True
    default = _json_default(key)
    if default is not None:
        described["default"] = default
    if isinstance(schema.get("type"), str):
        return {**described, **schema, "type": [schema["type"], "null"]}
    if isinstance(schema.get("type"), list):
        return {**described, **schema, "type": [*schema["type"], "null"]}
    if "anyOf" in schema:
        return {**described, "anyOf": [*schema["anyOf"], _NULL]}
    return {**described, "anyOf": [schema, _NULL]} if schema else described


def _values(key: Key) -> dict[str, Any]:
    assert key.field is not None
    if key.name == "teachers":
        return _teachers()
    if key.name == "features":
        return _features()
    if key.name == "resume_from_checkpoint":
        return {"type": ["string", "boolean"]}
    schema = as_json_schema(key.field)
    theirs = not key.is_own and isinstance(schema.get("type"), str | list)
    # What others take as text may be written as a number, and false for a mapping that is not there.
    if theirs and dict in key.field.kinds:
        return {"anyOf": [schema, {"const": False}]}
    if theirs and key.field.is_text:
        return {**schema, "type": ["string", "number"]}
    return schema


def _teachers() -> dict[str, Any]:
    checked = fields_of(RunArguments)
    names = [name for name in checked if name.startswith("teacher")]
    own = {name: as_json_schema(checked[name]) for name in names if name not in ("teachers", "teacher_column")}
    own = {name: {"anyOf": [schema, _NULL]} if checked[name].optional else schema for name, schema in own.items()}
    own[VIEW] = {"type": ["object", "string", "null"]}
    own["weight"] = {"type": "number", "exclusiveMinimum": 0}
    teacher = {"type": "object", "properties": own, "additionalProperties": False}
    return {"anyOf": [{"type": "object", "minProperties": 2, "additionalProperties": teacher}, {"type": "string"}]}


def _features() -> dict[str, Any]:
    own = {name: as_json_schema(field) for name, field in fields_of(FeatureTerm).items()}
    term = {"type": "object", "properties": own, "required": ["student"], "additionalProperties": False}
    terms = {"type": "array", "items": {"anyOf": [term, {"type": "string"}]}, "minItems": 1}
    return {"anyOf": [terms, term, {"type": "string"}]}


def _description(key: Key) -> str:
    group = f"{GROUPS[key.group]}: " if key.group != "other" else ""
    unused = f" Not of use here: {key.unused}" if key.unused else ""
    # A default that depends on other keys is said in the help.
    said = "Default: " in key.help or "(default)" in key.help or default_text(key.default) == "required"
    return f"{group}{key.help}{'' if said else f' Default: {default_text(key.default)}.'}{unused}"


def _json_default(key: Key) -> Any:
    value = key.default.value if isinstance(key.default, Enum) else key.default
    return value if isinstance(value, bool | int | float | str | list | dict) and value != [] else None


def _grouped(specs: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, ...], dict[str, Any]]:
    """The keys by the methods that have them in the very same way."""
    owners: dict[tuple[str, str], list[str]] = {}
    for method, properties in specs.items():
        for name, spec in properties.items():
            owners.setdefault((name, json.dumps(spec, sort_keys=True)), []).append(method)
    sets: dict[tuple[str, ...], dict[str, Any]] = {}
    for (name, spec), methods in owners.items():
        sets.setdefault(tuple(methods), {})[name] = json.loads(spec)
    return sets


def _of_any(specs: Iterable[Mapping[str, Any]], shared: Mapping[str, Any]) -> dict[str, Any]:
    """What any method takes, of the keys that not all have in the same way."""
    union: dict[str, list[Any]] = {}
    for properties in specs:
        for name, spec in properties.items():
            kinds = union.setdefault(name, [])
            checks = {
                word: value for word, value in spec.items() if word not in ("description", "default", "deprecated")
            }
            if name not in shared and checks not in kinds:
                kinds.append(checks)
    return {
        name: kinds[0] if len(kinds) == 1 else {"anyOf": kinds} for name, kinds in union.items() if name not in shared
    }


def _name_of(owners: Sequence[str]) -> str:
    return "of_" + "_and_".join(owners)


def _ref(owners: Sequence[str]) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{_name_of(owners)}"}


def _required(keys: Iterable[Sequence[Key]]) -> list[str]:
    return sorted({key.name for each in keys for key in each if default_text(key.default) == "required"})


def _not_null(keys: Iterable[Key], among: Mapping[str, Any]) -> dict[str, Any]:
    """Of the keys of a method that are among some, those that need a value where they are given."""
    needed = [key.name for key in keys if key.field is not None and not key.field.optional]
    return {name: {"not": _NULL} for name in sorted(needed) if name in among}


def _by_method(schemas: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """For each method, what holds where a recipe names it."""
    return [
        {
            "if": {"properties": {"method": {"const": method}}, "required": ["method"]},
            "then": {"allOf": schema},
        }
        for method, schema in schemas.items()
    ]


def _launch_keys(known: Mapping[str, Any]) -> dict[str, Any]:
    return {name: action for name, action in sorted(launch_options().items()) if name not in known}


def _plain(text: str | None) -> str:
    return " ".join((text or "").replace("%%", "%").split())
