"""The filters of a data recipe: which mapped rows stay, and why the others do not."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from .arrow import read_rows
from .left_out import LeftOut
from .messages import missing, texts_of
from .recipe import DataRecipe
from .templates import as_text

logger = logging.getLogger(__name__)

# Values named where none is the one asked for.
_SHOWN = 5


_YES = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}


class Sieve:
    """The filters of a recipe on one split: which rows stay, and why the others do not."""

    def __init__(self, recipe: DataRecipe, split: str, held_out: set[bytes] | None = None) -> None:
        self.split = split
        self.name = recipe.name
        self.filters = recipe.filters
        self.held_out = held_out or set()
        self.seen: set[bytes] = set()
        self.removed: Counter[str] = Counter()
        self.left_out = LeftOut(f"{recipe.name} {split}")
        # CSV has no null: there a cell is empty.
        self.nulls = (None, "") if recipe.source == "csv" else (None,)
        self.other_values: dict[str, set[str]] = {}

    def equal(self, raw: Dataset) -> Sequence[int]:
        """The indices of the rows with the values that `equals` asks for."""
        if not self.filters.equals:
            return range(len(raw))
        kept = []
        for i, row in enumerate(read_rows(raw, list(self.filters.equals))):
            differs = [key for key, asked in self.filters.equals.items() if not self._is_equal(row[key], asked)]
            if not differs:
                kept.append(i)
                continue
            self.removed["equals"] += 1
            for key in differs:
                others = self.other_values.setdefault(key, set())
                if len(others) < _SHOWN:
                    others.add(as_text(row[key]))
        return kept

    def _is_equal(self, value: Any, asked: Any) -> bool:
        """Whether a value is the one asked for, or written like it: a file may hold 3 as text, or true as a word."""
        if asked is None or value is None:
            return asked is None and value in self.nulls
        if value == asked or as_text(value) == as_text(asked):
            return True
        if isinstance(asked, str) and isinstance(value, bool):
            return _YES.get(asked.lower()) == value
        if isinstance(asked, str) and isinstance(value, int | float):
            return asked.replace("_", "").replace(".", "", 1).isdecimal() and float(asked) == value
        return False

    def keep(self, rows: Dataset, limit: int | None, numbers: Sequence[int]) -> list[int]:
        """The indices of the first `limit` rows that no filter removes; `numbers` are the rows' in the source."""
        compared = self.filters.dedupe or self.held_out
        columns = [name for name in rows.column_names if compared or name != "images"]
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
        # Elsewhere an answer may follow on nothing, if the file says so: "" and not null.
        if asks_nothing and ("completion" not in row or "" in self.nulls):
            return "without prompt"
        return missing(row)

    def _reason(self, row: Mapping[str, Any]) -> str | None:
        filters, said = self.filters, _answer(row)
        if filters.min_chars is not None and len(said) < filters.min_chars:
            return "min_chars"
        if filters.max_chars is not None and len(said) > filters.max_chars:
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

    def say(self, of: int) -> None:
        """Warns of the rows left out and removed, if there are any, out of so many that were read."""
        self.left_out.say(of)
        if self.removed.total():
            logger.warning("%s %s: filters: %s of %d rows.", self.name, self.split, self._removals(), of)

    def describe(self, of: int) -> str:
        """Why no row is left of so many, in words."""
        reasons = [self.left_out.describe(of)] if len(self.left_out) else []
        reasons += [f"Filters: {self._removals()}."] if self.removed.total() else []
        for key, others in self.other_values.items():
            asked = as_text(self.filters.equals[key])
            reasons.append(f"equals asks for {key} {asked}, and rows have {', '.join(sorted(others))}.")
        return " ".join(reasons)

    def _removals(self) -> str:
        return ", ".join(f"{name} removed {count}" for name, count in sorted(self.removed.items()))


def _answer(row: Mapping[str, Any]) -> str:
    """What the student learns to say in a row: the text, the completion, or all that the assistant says."""
    if "text" in row:
        return row["text"] or ""
    said = row["completion"] if "completion" in row else row.get("messages")
    if isinstance(said, str) or said is None:
        return said or ""
    return "\n".join(_spoken(message) for message in said if message["role"] == "assistant")


def _spoken(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls")
    # Vision-language sets write content as parts, of which only those of text are said.
    return "\n".join([*texts_of(message), *([] if calls is None else [json.dumps(calls)])])


def row_key(row: Mapping[str, Any]) -> bytes:
    return hashlib.blake2b(repr(sorted(row.items())).encode(), digest_size=16).digest()
