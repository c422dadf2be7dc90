"""Text from a row's columns by a `{column}` template of a data recipe."""

import string
from collections.abc import Mapping
from typing import Any

from .columns import template_columns
from .json_rows import json_text


def filled(template: str, row: Mapping[str, Any]) -> str:
    """A template filled with a row's values; null becomes an empty text, other values are written as in JSON.

    In addition to the formats of str.format, `{list:letters}` gives lettered lines and `{number:letter}` a letter.
    """
    return _FORMATTER.vformat(template, (), row)


def filled_answer(template: str, row: Mapping[str, Any]) -> str:
    """A filled template for an answer; empty if all its columns are: "Answer: " without an answer teaches nothing."""
    columns = template_columns(template)
    if columns and all(is_empty(row[column]) for column in columns):
        return ""
    return filled(template, row)


def is_empty(value: Any) -> bool:
    """Whether a value is null, or text without a visible character."""
    return value is None or (isinstance(value, str) and not value.strip())


def as_text(value: Any) -> str:
    """A value in the notation of a JSON file; text without quotes."""
    return json_text(value) if isinstance(value, bool | list | dict) else str(value)


class _Formatter(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        # Optional columns such as Alpaca's `input` may be null, and must not become the text "None".
        if value is None:
            return ""
        if format_spec == "letters":
            return "\n".join(f"{string.ascii_uppercase[i]}. {choice}" for i, choice in enumerate(value))
        if format_spec == "letter":
            return string.ascii_uppercase[int(value)]
        return super().format_field(value, format_spec) if format_spec else as_text(value)


_FORMATTER = _Formatter()
