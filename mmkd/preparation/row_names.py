"""Which row of the data one of a batch is: found when something is wrong with it, and at no cost before."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from typing import Any

from datasets import Dataset

STORED_IMAGES = "stored_images"
"""Where a row whose images are decoded keeps them as the data set stores them."""

_COLUMNS = ("text", "messages", "prompt", "completion")
_READ = 1000
# Rows that are named where one of several is meant.
_NAMED = 3


class RowNames:
    """Names rows by their numbers in the data sets of a run."""

    def __init__(self) -> None:
        self._splits: dict[str, _Places] = {}

    def add(self, data: Any, split: str) -> None:
        """Makes the rows of a data set known, or those of a dict of them; of streams nobody knows the numbers."""
        if isinstance(data, Mapping):
            for name, part in data.items():
                self.add(part, str(name))
        elif isinstance(data, Dataset) and data.format["type"] != "custom":
            self._splits[split] = _Places(data)

    def of(self, row: Mapping[str, Any]) -> str:
        """What to call a row of a batch; "A row" where it is in none of the data sets."""
        for split, places in self._splits.items():
            number = places.find(row)
            if number is not None:
                return f"Row {number} of the {split} data (from 0, after filters and shuffle)"
        return "A row"

    def of_key(self, key: int) -> str:
        """What to call the row with this key (`row_key`), or the first few that have it; "A row" where none has."""
        for split, places in self._splits.items():
            if numbers := places.numbers[key]:
                which = " or ".join(map(str, numbers[:_NAMED])) + (" or another" if len(numbers) > _NAMED else "")
                return f"Row {which} of the {split} data (from 0, after filters and shuffle)"
        return "A row"


def row_key(row: Mapping[str, Any]) -> int:
    """What a row is looked up by where it is not at hand itself: its text and, roughly, its images."""
    images = row.get(STORED_IMAGES, row.get("images")) or []
    return _key([row[name] for name in _COLUMNS if name in row], images)


class _Places:
    """The numbers of the rows of a data set."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.columns = [name for name in _COLUMNS if name in dataset.column_names]

    def find(self, row: Mapping[str, Any]) -> int | None:
        """The number of the first row that says the same about the same images."""
        if not self.columns or any(name not in row for name in self.columns):
            return None
        images = row.get(STORED_IMAGES, row.get("images")) or []
        for number in self.numbers[_key([row[name] for name in self.columns], images)]:
            if "images" not in self.dataset.column_names or (self.dataset[number]["images"] or []) == images:
                return number
        return None

    @cached_property
    def numbers(self) -> defaultdict[int, list[int]]:
        """Key -> rows. Made by the first bad row, since with on_bad_row: skip there may be thousands."""
        numbers: defaultdict[int, list[int]] = defaultdict(list)
        for number, (values, images) in enumerate(self._rows()):
            numbers[_key(values, images)].append(number)
        return numbers

    def _rows(self) -> Iterator[tuple[list[Any], Sequence[Any]]]:
        columns = [*self.columns, *(["images"] if "images" in self.dataset.column_names else [])]
        for batch in self.dataset.select_columns(columns).iter(_READ):
            rows: Any = batch
            images = rows.get("images") or [[]] * len(rows[self.columns[0]])
            for values, shown in zip(zip(*(rows[name] for name in self.columns), strict=True), images, strict=True):
                yield list(values), shown or []


def _key(values: list[Any], images: Sequence[Any]) -> int:
    """What rows are looked up by. Bytes of images count by their number: most rows need no more to be told apart."""
    shown = [_summary(image) for image in images]
    # Not by Python's hash, which differs between processes: keys come from a data loader's workers.
    return int.from_bytes(blake2b(repr((values, shown)).encode(), digest_size=8).digest(), "little")


def _summary(image: Any) -> Any:
    if not isinstance(image, Mapping):
        return type(image).__name__
    return image.get("path"), len(image.get("bytes") or b"")
