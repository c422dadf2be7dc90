"""Conversion of streams of any layout to TRL's columns, row by row, with log messages about rows left out."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import IterableDataset

from mmkd.errors import UserError

from .arrow import has_json
from .canonical import CHATS, DatasetTraits, Layout, canonical_row, finished, image_column_of
from .conversion import Conversion
from .messages import RowImages, missing


def converted_stream(
    data: IterableDataset, layout: Layout, kept: Sequence[str], conversion: Conversion, columns: list[str]
) -> IterableDataset:
    """The stream's rows in TRL's columns, with the columns `kept`. Errors in a row are raised when it is read."""
    images = image_column_of(columns, layout)
    nulls = data.features is not None and not any(has_json(data.features[name]) for name in layout.reads)
    reader = _Reader(layout, kept, conversion, images, nulls)
    return data.map(reader, with_indices=True, batched=True, batch_size=1, remove_columns=columns)


class _Reader:
    """Converts one row of a stream at a time."""

    def __init__(
        self, layout: Layout, kept: Sequence[str], conversion: Conversion, images: str | None, nulls: bool
    ) -> None:
        self.layout, self.kept, self.conversion, self.images, self.nulls = layout, kept, conversion, images, nulls
        self.out: set[int] = set()
        self.names: list[str] = []

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        row = {name: values[0] for name, values in batch.items()}
        ours = self._read(row, indices[0])
        self.names = self.names or list(ours or ())
        return {name: [] if ours is None else [ours[name]] for name in self.names}

    def _read(self, row: Mapping[str, Any], number: int) -> dict[str, Any] | None:
        """The row in TRL's columns, or None if it is left out."""
        value = None if self.images is None else row[self.images]
        images = value if isinstance(value, list) else [] if value is None else [value]
        own = RowImages(self.images is not None, len(images), lambda: images, self.conversion.folders)
        try:
            ours = canonical_row(row, self.layout, own, nulls=self.nulls)
        except UserError as error:
            if not self.conversion.skip:
                raise UserError(f"{self.conversion.split} row {number}: {error}.") from error
            return self._leave_out(number, f"that cannot be read: {error}")
        reason = missing(ours)
        if reason is not None:
            return self._leave_out(number, reason)
        images = ours.pop("images", images)
        parts = any(isinstance(message.get("content"), list) for name in CHATS for message in _chat(ours.get(name)))
        with_images = self.images is not None or bool(images)
        ours = finished(ours, self.layout, DatasetTraits(with_images, parts=parts), len(images))
        if ours["tools"] is None and "tools" not in self.layout.reads:
            del ours["tools"]
        return {**ours, **({"images": images} if with_images else {}), **{name: row[name] for name in self.kept}}

    def _leave_out(self, number: int, reason: str) -> None:
        # A stream is restarted in every epoch, and once to read its first row: count each row once.
        left_out = self.conversion.left_out
        if left_out is None or number in self.out:
            return
        self.out.add(number)
        left_out.add(number, reason)
        # The length of a stream is unknown: log at 1, 10, 100, ... rows left out.
        if str(len(self.out)).strip("0") == "1":
            left_out.warn(number + 1)


def _chat(value: Any) -> Sequence[Mapping[str, Any]]:
    return value if isinstance(value, list) else ()
