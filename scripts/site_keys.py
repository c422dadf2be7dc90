"""Two pages of the site, made from the fields that recipes are read by: the keys of recipes and of data recipes."""

import re
from collections.abc import Iterable
from typing import Any

from mmkd.data.data_schema import class_data_recipe_schema, data_recipe_schema
from mmkd.recipe.key_format import Key, default_text
from mmkd.recipe.key_groups import GROUPS
from mmkd.recipe.key_reference import keys_of, keys_of_all
from mmkd.training.method import METHODS

_WORDS = {"string": "text", "integer": "whole number", "object": "mapping", "array": "list"}
_WORDS |= {"boolean": "true | false"}
_METHODS = [name for name in METHODS if METHODS[name].config.__module__.startswith("mmkd.")]


def key_page() -> str:
    """The page of all keys of a recipe, in the groups of --help_keys."""
    keys = [key for key in keys_of_all() if key.method in ("", *_METHODS)]
    shown = [key for key in keys if not key.unused]
    lines = [
        "# Keys of a recipe",
        "",
        "A recipe is a YAML file of `key: value` lines. Every key is also a flag of `mmkd-train`, and flags win over "
        "the file. `mmkd-train RECIPE --help_keys` prints the keys of its method in the terminal, and "
        "`--help_keys WORD` finds a key by its name or description. In an editor with a YAML language server, the "
        "first line of the shipped recipes makes it complete and check keys.",
        "",
        "Keys of mmkd come first in each group, and then those of transformers and TRL.",
    ]
    for title, group in _sections(shown):
        lines += ["", f"## {title}", ""]
        if title == GROUPS["other"]:
            lines += ["| key | value | default | |", "|---|---|---|---|", *(_row(key) for key in group)]
        else:
            lines += [line for key in group for line in _entry(key)]
    unused = {key.name: key for key in keys if key.unused}
    names = {key.name for key in shown}
    lines += ["", "## Keys without a use in a recipe", "", "| key | why |", "|---|---|"]
    lines += [f"| `{key.name}` | {_cell(key.unused)} |" for key in unused.values() if key.name not in names]
    return "\n".join([*lines, ""])


def data_key_page() -> str:
    """The page of all keys of a data recipe."""
    lines = [
        "# Keys of a data recipe",
        "",
        "A data recipe says where rows come from and how they are read. Without one, `data` in a recipe can name a "
        "file, a folder, a glob or a data set on the Hub. `mmkd data preview SOURCE --write data.yaml` writes one.",
        "",
        "## Rows to learn from",
        "",
        *_properties(data_recipe_schema()),
        "## Rows with one class each",
        "",
        "Method `dho` reads these.",
        "",
        *_properties(class_data_recipe_schema(), "class-"),
    ]
    return "\n".join([*lines, ""])


def _sections(keys: Iterable[Key]) -> list[tuple[str, list[Key]]]:
    sections: dict[str, list[Key]] = {}
    for key in keys:
        title = f"Method {key.method}" if key.method else GROUPS[key.group]
        sections.setdefault("Every method" if title == GROUPS["method"] else title, []).append(key)
    return list(sections.items())


def _entry(key: Key) -> list[str]:
    anchor = key.name if not key.method else f"{key.method}-{key.name}"
    takes = "" if key.field is None else key.field.described()
    facts = [f"`{takes}`" if takes else "", _default(key)]
    readers = "" if key.method else _readers(key.name)
    return [
        f"**`{key.name}`** {', '.join(fact for fact in facts if fact)}",
        f"{{: #{anchor} }}",
        "",
        f"{_escaped(key.help)}{readers}",
        "",
    ]


def _default(key: Key) -> str:
    default = default_text(key.default)
    return {"required": "required", "not set": ""}.get(default, f"default `{default}`")


def _readers(name: str) -> str:
    """The methods that read a key, where these are not all."""
    readers = [method for method in _METHODS if any(key.name == name and not key.unused for key in keys_of(method))]
    return "" if len(readers) == len(_METHODS) else f" *Methods: {', '.join(readers)}.*"


def _row(key: Key) -> str:
    takes = "" if key.field is None else key.field.described()
    default = default_text(key.default)
    return f"| `{key.name}` | {_cell(takes)} | {_cell('' if default == 'not set' else default)} | {_cell(key.help)} |"


def _properties(schema: dict[str, Any], prefix: str = "", level: int = 0) -> list[str]:
    """The keys of an object, and those of the objects in it."""
    lines: list[str] = []
    for name, value in schema["properties"].items():
        inner = [value, *value.get("anyOf", ()), value.get("items", {}), value.get("additionalProperties") or {}]
        required = ", required" if name in schema["required"] else ""
        lines += [f"**`{name}`** {_type(value)}{required}", f"{{: #{prefix}{name} }}", ""]
        lines += [_escaped(value.get("description", "")), ""]
        nested = next((part for part in inner if isinstance(part, dict) and "required" in part), None)
        if nested is not None and level == 0 and name in ("filters", "mixture"):
            lines += _rows(nested)
        if name == "columns" and "properties" in value:
            messages, turns = next(iter(value["properties"].values()))["anyOf"][1:]
            lines += ["Options of a column of messages:", "", *_rows(messages)]
            lines += ["A question and an answer in columns of their own:", "", *_rows(turns)]
    return lines


def _rows(schema: dict[str, Any]) -> list[str]:
    rows = [
        f"| `{name}` | {_cell(_type(value))} | {_cell(value.get('description', ''))} |"
        for name, value in schema["properties"].items()
    ]
    return ["| key | value | |", "|---|---|---|", *rows, ""]


def _type(value: dict[str, Any]) -> str:
    kinds = value.get("type", [])
    words = {
        "string": "text",
        "integer": "whole number",
        "object": "mapping",
        "array": "list",
        "boolean": "true | false",
    }
    kinds = [words.get(kind, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds) if kind != "null"]
    return f"`{' | '.join(kinds)}`" if kinds else ""


def _escaped(text: str) -> str:
    """Text in which Markdown and HTML see no marks of theirs; names of keys are shown as code."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if part.startswith("`") else _marked(part) for part in parts)


def _marked(text: str) -> str:
    text = re.sub(r"([\\*<{\[])", r"\\\1", text)
    return re.sub(r"(?<![\w./-])[a-z0-9]+(?:_[a-z0-9]+)+(?![\w/])", r"`\g<0>`", text).replace(" _", " \\_")


def _cell(text: str) -> str:
    return _escaped(text).replace("|", "\\|")
