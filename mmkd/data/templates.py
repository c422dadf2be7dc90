"""Text from a row's columns: what `{column}` in a data recipe becomes."""

import string
from collections.abc import Mapping
from typing import Any

from .columns import template_columns
from .json_rows import json_text


def filled(template: str, row: Mapping[str, Any]) -> str:
    """A template with a row's values: nothing for null, and true, 1e5 or {"a": 1} as JSON writes them.

    Besides what str.format knows, `{list:letters}` is lettered lines and `{number:letter}` one letter.
    """
    return _FORMATTER.vformat(template, (), row)


def filled_answer(template: str, row: Mapping[str, Any]) -> str:
    """The same for an answer, which is empty where all of its columns are: "Answer: " alone teaches nothing."""
    columns = template_columns(template)
    if columns and all(is_empty(row[column]) for column in columns):
        return ""
    return filled(template, row)


def is_empty(value: Any) -> bool:
    """Whether a value is null, or text without a visible character."""
    return value is None or (isinstance(value, str) and not value.strip())


def as_text(value: Any) -> str:
    """A value as a file would write it."""
    return json_text(value) if isinstance(value, bool | list | dict) else str(value)


class _Formatter(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        # Optional columns such as Alpaca's `input` are null where there is none, and "None" is no text.
        if value is None:
            return ""
        if format_spec == "letters":
            return "\n".join(f"{string.ascii_uppercase[i]}. {choice}" for i, choice in enumerate(value))
        if format_spec == "letter":
            return string.ascii_uppercase[int(value)]
        return super().format_field(value, format_spec) if format_spec else as_text(value)


_FORMATTER = _Formatter()
