"""YAML files of users: errors that name file and line, no key twice, and text that stays as it was written."""

import re
from pathlib import Path
from typing import Any

import yaml

from mmkd.errors import UserError

_TRUE_OR_FALSE = ("true", "True", "TRUE", "false", "False", "FALSE")


class AsWritten(str):
    """Text that YAML 1.1 reads as something else, such as no, 00501 or 12:30; `value` is what YAML makes of it."""

    value: Any

    def __new__(cls, text: str, value: Any) -> "AsWritten":
        """The text, with what YAML makes of it."""
        written = super().__new__(cls, text)
        written.value = value
        return written


def read_yaml(path: Path, *, as_written: bool = False) -> Any:
    """What a YAML file holds; with `as_written`, values of which YAML 1.1 would lose the spelling are `AsWritten`.

    Keys are text then, however they are spelled. Raises UserError for a file that is no YAML, or has a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not valid YAML: byte {error.start} is not UTF-8; save the file as UTF-8."
        ) from error
    try:
        return yaml.load(text, _WrittenLoader if as_written else _Loader)
    except _DuplicateYAMLKey as error:
        raise UserError(f"{path}: {error}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise UserError(f"{path} is not valid YAML: {where}{error.problem or error.context}.") from error
    except (yaml.YAMLError, ValueError) as error:
        # ValueError: a date such as 2024-02-31, which YAML's types allow and the calendar does not.
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error


class _DuplicateYAMLKey(Exception):
    """A mapping with the same key twice, of which YAML would keep the last."""


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here and not where mappings are constructed: merging (<<) repeats keys on purpose before that.
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise _DuplicateYAMLKey(
                    f"the key {key.value!r} stands in line {lines[key.value]} and again in line {line}, so that one "
                    "of the two would be lost; remove one."
                )
            lines[key.value] = line
        return node


class _WrittenLoader(_Loader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        pairs = {}
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else self.construct_object(key, deep=True)
            if isinstance(name, list | dict):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key.start_mark)
            pairs[name] = self.construct_object(value, deep=deep)
        return pairs


def _construct_written(loader: Any, node: yaml.ScalarNode) -> Any:
    value = yaml.SafeLoader.yaml_constructors[node.tag](loader, node)
    if isinstance(value, bool):
        return value if node.value in _TRUE_OR_FALSE else AsWritten(node.value, value)
    is_number = isinstance(value, int | float)
    return value if is_number and str(value) == node.value else AsWritten(node.value, value)


for _kind in ("bool", "int", "float", "timestamp"):
    _WrittenLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _construct_written)
# YAML 1.1 asks for a point in a number with an exponent; to everybody else 1e-3 is a number.
_WrittenLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)
