"""The filters of a data recipe: which mapped rows stay, and why the others do not."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from mmkd.data.arrow import read_rows
from mmkd.data.messages import missing, texts_of
from mmkd.data.recipe import DataRecipe


class Sieve:
    """The filters of a recipe on one split: which rows stay, and how many each filter removed."""

    def __init__(self, recipe: DataRecipe, split: str, held_out: set[bytes] | None = None) -> None:
        self.split = split
        self.filters = recipe.filters
        self.held_out = held_out or set()
        self.seen: set[bytes] = set()
        self.removed: Counter[str] = Counter()

    def equal(self, raw: Dataset) -> Sequence[int]:
        """The indices of the rows with the values that `equals` asks for."""
        if not self.filters.equals:
            return range(len(raw))
        rows = read_rows(raw, list(self.filters.equals))
        kept = [i for i, row in enumerate(rows) if all(row[k] == v for k, v in self.filters.equals.items())]
        if len(kept) < len(raw):
            self.removed["equals"] += len(raw) - len(kept)
        return kept

    def keep(self, rows: Dataset, limit: int | None) -> list[int]:
        """The indices of the first `limit` rows that no filter removes."""
        compared = self.filters.dedupe or self.held_out
        columns = [name for name in rows.column_names if compared or name != "images"]
        kept: list[int] = []
        for i, row in enumerate(read_rows(rows, columns)):
            if limit is not None and len(kept) == limit:
                break
            reason = self._reason(row)
            if reason is None:
                kept.append(i)
            else:
                self.removed[reason] += 1
        return kept

    def _reason(self, row: Mapping[str, Any]) -> str | None:
        filters, said = self.filters, _answer(row)
        if filters.drop_empty and missing(row) is not None:
            return "drop_empty"
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

    def report(self) -> str:
        """How many rows each filter removed, in words."""
        counts = [f"{name} removed {count}" for name, count in sorted(self.removed.items())]
        return ", ".join(counts) or "no filter removed any"


def _answer(row: Mapping[str, Any]) -> str:
    """What the student learns to say in a row: the text, the completion, or all that the assistant says."""
    if "text" in row:
        return row["text"] or ""
    said = row["completion"] if "completion" in row else row["messages"]
    if isinstance(said, str) or said is None:
        return said or ""
    return "\n".join(_spoken(message) for message in said if message["role"] == "assistant")


def _spoken(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls")
    # Vision-language sets write content as parts, of which only those of text are said.
    return "\n".join([*texts_of(message), *([] if calls is None else [json.dumps(calls)])])


def row_key(row: Mapping[str, Any]) -> bytes:
    return hashlib.blake2b(repr(sorted(row.items())).encode(), digest_size=16).digest()
