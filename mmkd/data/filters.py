"""The filters of a data recipe: the mapped rows to keep, and the reasons for removing the others."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from .arrow import read_rows
from .data_recipe import OUTPUT_COLUMNS, DataRecipe
from .left_out import LeftOut
from .messages import missing, texts_of
from .templates import as_text

logger = logging.getLogger(__name__)

# The number of values that a message lists where no row has the expected one.
_SHOWN = 5
_YES = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}


class RowFilter:
    """The filters of a recipe for one split, with counts of the removed rows by reason.

    `also` are columns that are kept besides, of which no filter but `equals` knows.
    """

    def __init__(
        self, recipe: DataRecipe, split: str, held_out: set[bytes] | None = None, also: Sequence[str] = ()
    ) -> None:
        self.split, self.also = split, also
        self.name = recipe.name
        self.filters = recipe.filters
        self.held_out = held_out or set()
        self.seen: set[bytes] = set()
        self.removed: Counter[str] = Counter()
        self.left_out = LeftOut(f"{recipe.name} {split}")
        # CSV has no null; its cells are empty instead.
        self.nulls = (None, "") if recipe.source == "csv" else (None,)
        self.other_values: dict[str, set[str]] = {}

    def equal(self, raw: Dataset) -> Sequence[int]:
        """The indices of the rows with the values that `equals` requires."""
        if not self.filters.equals:
            return range(len(raw))
        kept = []
        for i, row in enumerate(read_rows(raw, list(self.filters.equals))):
            differs = [key for key, expected in self.filters.equals.items() if not self._is_equal(row[key], expected)]
            if not differs:
                kept.append(i)
                continue
            self.removed["equals"] += 1
            for key in differs:
                values = self.other_values.setdefault(key, set())
                if len(values) < _SHOWN:
                    values.add(as_text(row[key]))
        return kept

    def _is_equal(self, value: Any, expected: Any) -> bool:
        """Whether a value equals the expected one, or its text does: a file may hold 3 as text, or true as a word."""
        if expected is None or value is None:
            return expected is None and value in self.nulls
        if value == expected or as_text(value) == as_text(expected):
            return True
        if isinstance(expected, str) and isinstance(value, bool):
            return _YES.get(expected.lower()) == value
        if isinstance(expected, str) and isinstance(value, int | float):
            return expected.replace("_", "").replace(".", "", 1).isdecimal() and float(expected) == value
        return False

    def keep(self, rows: Dataset, limit: int | None, numbers: Sequence[int]) -> list[int]:
        """The indices of the first `limit` rows that pass; `numbers` are the numbers of the rows in the source."""
        compared = self.filters.dedupe or self.held_out
        columns = [name for name in compared_columns(rows, self.also) if compared or name != "images"]
        kept: list[int] = []
        for i, row in enumerate(read_rows(rows, columns)):
            if limit is not None and len(kept) == limit:
                break
            lack = self._lack(row) if self.filters.drop_empty else None
            if lack is not None:
                self.left_out.add(int(numbers[i]), lack)
                continue
            reason = self._reason(row)
            if reason is None:
                kept.append(i)
            else:
                self.removed[reason] += 1
        return kept

    def _lack(self, row: Mapping[str, Any]) -> str | None:
        asks_nothing = isinstance(row.get("prompt"), str) and not row["prompt"].strip()
        # Except in CSV, an explicitly empty prompt ("" and not null) is allowed: the completion is text from its
        # beginning.
        if asks_nothing and ("completion" not in row or "" in self.nulls):
            return "without prompt"
        return missing(row)

    def _reason(self, row: Mapping[str, Any]) -> str | None:
        filters, answer = self.filters, _answer(row)
        if filters.min_chars is not None and len(answer) < filters.min_chars:
            return "min_chars"
        if filters.max_chars is not None and len(answer) > filters.max_chars:
            return "max_chars"
        if not (filters.dedupe or self.held_out):
            return None
        key = row_key(row)
        if key in self.held_out:
            return "equal to an eval row"
        if not filters.dedupe:
            return None
        if key in self.seen:
            return "dedupe"
        self.seen.add(key)
        return None

    def warn(self, of: int) -> None:
        """Logs a warning about rows that were left out or removed, if any, among the `of` rows that were read."""
        self.left_out.warn(of)
        if self.removed.total():
            logger.warning("%s %s: filters: %s of %d rows.", self.name, self.split, self._removals(), of)

    def describe(self, of: int) -> str:
        """The reasons why none of `of` rows is left, as text for a message."""
        reasons = [self.left_out.describe(of)] if len(self.left_out) else []
        reasons += [f"Filters: {self._removals()}."] if self.removed.total() else []
        for key, values in self.other_values.items():
            expected = as_text(self.filters.equals[key])
            reasons.append(f"equals asks for {key} {expected}, and rows have {', '.join(sorted(values))}.")
        return " ".join(reasons)

    def _removals(self) -> str:
        return ", ".join(f"{name} removed {count}" for name, count in sorted(self.removed.items()))


def _answer(row: Mapping[str, Any]) -> str:
    """The text that the student learns from a row: the text, the completion, or all turns of the assistant."""
    if "text" in row:
        return row["text"] or ""
    answer = row["completion"] if "completion" in row else row.get("messages")
    if isinstance(answer, str) or answer is None:
        return answer or ""
    return "\n".join(_turn_text(message) for message in answer if message["role"] == "assistant")


def _turn_text(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls")
    # Content may be a list of parts, of which only text parts are written by the assistant.
    return "\n".join([*texts_of(message), *([] if calls is None else [json.dumps(calls)])])


def compared_columns(rows: Dataset, also: Sequence[str]) -> list[str]:
    """The columns by which rows are equal: all but those that are kept besides."""
    return [name for name in rows.column_names if name in OUTPUT_COLUMNS or name not in also]


def row_key(row: Mapping[str, Any]) -> bytes:
    return hashlib.blake2b(repr(sorted(row.items())).encode(), digest_size=16).digest()
