"""YAML files of users: errors with file and line, no duplicate keys, and values that keep their spelling."""

import re
from pathlib import Path
from typing import Any

import yaml

from mmkd.errors import UserError

_MOST_VALUES = 2_000_000
_TRUE_OR_FALSE = ("true", "True", "TRUE", "false", "False", "FALSE")


class AsWritten(str):
    """The original text of a value that YAML 1.1 converts, such as no, 00501 or 12:30; `value` is the conversion."""

    value: Any

    def __new__(cls, text: str, value: Any) -> "AsWritten":
        """The text, with its value in YAML."""
        written = super().__new__(cls, text)
        written.value = value
        return written


def read_yaml(path: Path, *, as_written: bool = False) -> Any:
    """The content of a YAML file; with `as_written`, values whose spelling YAML 1.1 would lose are `AsWritten`.

    With `as_written`, keys are always text. Raises UserError for a file that is not valid YAML or has a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not valid YAML: byte {error.start} is not UTF-8; save the file as UTF-8."
        ) from error
    try:
        value = yaml.load(text, _WrittenLoader if as_written else _Loader)
    except _DuplicateYAMLKey as error:
        raise UserError(f"{path}: {error}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise UserError(f"{path} is not valid YAML: {where}{error.problem or error.context}.") from error
    except RecursionError as error:
        raise UserError(f"{path} is not valid YAML: it is nested too deeply.") from error
    except (yaml.YAMLError, ValueError) as error:
        # ValueError: a date such as 2024-02-31, which YAML's types allow and the calendar does not.
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if _is_endless(value):
        raise UserError(f"{path} repeats itself without end: an alias (*name) stands in what it names. Write it out.")
    return value


def _is_endless(value: Any) -> bool:
    """Whether a value holds itself, or parts so often that reading it would take for ever."""
    left, seen = [value], 0
    while left and seen < _MOST_VALUES:
        own, seen = left.pop(), seen + 1
        if isinstance(own, dict):
            left += [*own.keys(), *own.values()]
        elif isinstance(own, list | tuple | set):
            left += own
    return bool(left)


class _DuplicateYAMLKey(Exception):
    """A mapping has the same key twice; YAML would silently keep the last."""


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Checked on nodes and not on constructed mappings, since merging (<<) repeats keys on purpose in between.
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
# YAML 1.1 reads 1e-3 as text because it has no decimal point; users mean a number.
_WrittenLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)
