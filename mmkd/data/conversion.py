"""Conversion of data sets of any layout to TRL's columns: all rows are checked; rows are copied only if needed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Json, LargeList, List, Value

from mmkd.errors import UserError
from mmkd.seams.datasets_seam import indices_of

from .arrow import BATCH, encoded_json, has_json, plain_rows, storage
from .canonical import CHATS, OURS, DatasetTraits, Layout, canonical_row, features_of, finished, image_column_of
from .columns import ROLES
from .image_columns import image_counts, image_lists
from .left_out import LeftOut
from .messages import IMAGE_MARK, RowImages, missing, stored, without_nulls

# Raise it when the same rows give another result: the cache of `datasets` identifies our functions by name only.
# 2: answers in a column of their own become completions.
_VERSION = 2


@dataclass(frozen=True)
class Conversion:
    """The conversion of the rows of one split, and the rows that are left out of it."""

    split: str
    left_out: LeftOut | None = None
    """Collects the rows that are left out; without it, incomplete rows are kept."""
    skip: bool = False
    """Whether unreadable rows are left out too, instead of raising an error."""
    folders: tuple[Path, ...] = ()
    """The folders in which relative paths of images in messages are looked up."""
    image_folder: str | None = None
    """The folder of relative paths in a column of images."""

    def converted(
        self, dataset: Dataset, layout: Layout, kept: Sequence[str], numbers: Sequence[int] | None = None
    ) -> Dataset:
        """The rows in TRL's columns, with the columns `kept` of the source.

        `numbers` are the numbers of the rows in the source, by default those in the data set before any selection.
        Raises UserError for the first row that cannot be read.
        """
        numbers = source_rows(dataset) if numbers is None else numbers
        images = image_column_of(dataset.column_names, layout)
        traits, out = self._traits(dataset, layout, images, numbers)
        features = features_of(traits, layout, dataset.features, kept)
        own = [name for name in features if name in OURS and name != "images"]
        if (
            not layout.as_is
            or traits.changed
            or traits.brought
            or any(not _alike(features[name], dataset.features.get(name)) for name in own)
        ):
            chosen: Any = dataset if not out else dataset.select(_without(len(dataset), out))
            return self._copied(chosen, layout, traits, features, images)
        columns = [name for name in dataset.column_names if name in (*layout.reads, *kept, images)]
        same: Any = dataset if columns == dataset.column_names else dataset.select_columns(columns)
        return same if not out else same.select(_without(len(dataset), out))

    def _copied(
        self, dataset: Dataset, layout: Layout, traits: DatasetTraits, features: Features, images: str | None
    ) -> Dataset:
        """The rows in TRL's columns, copied."""
        return (
            dataset.with_format("arrow")
            .map(
                _convert,
                batched=True,
                batch_size=BATCH,
                fn_kwargs={
                    "layout": layout,
                    "traits": traits,
                    "source": dataset.features,
                    "features": features,
                    "images": images,
                    "folders": self.folders,
                    "image_folder": self.image_folder,
                    "version": _VERSION,
                },
                remove_columns=dataset.column_names,
                features=features,
                desc=f"Reading {layout.name}",
            )
            .with_format(None)
        )

    def _traits(
        self, dataset: Dataset, layout: Layout, images: str | None, numbers: Sequence[int]
    ) -> tuple[DatasetTraits, set[int]]:
        """The traits of all rows, and the places of the rows that are left out."""
        traits, out = DatasetTraits(images is not None), set()
        for place, row, pictures in _looked_at(dataset, layout, images, self.folders):
            try:
                ours = canonical_row(row, layout, pictures, nulls=_has_nulls(dataset.features, layout))
            except UserError as error:
                if not self.skip or self.left_out is None:
                    raise UserError(f"{self.split} row {numbers[place]}: {error}.") from error
                self.left_out.add(numbers[place], f"that cannot be read: {error}")
                out.add(place)
                continue
            reason = None if self.left_out is None else missing(ours)
            if self.left_out is not None and reason is not None:
                self.left_out.add(numbers[place], reason)
                out.add(place)
                continue
            traits.images |= ours.get("images") is not None
            traits.see(ours)
            traits.changed |= layout.as_is and not traits.changed and _differs(row, ours)
        for name in layout.reads if layout.as_is else ():
            if name in ("text", *CHATS):
                traits.columns.setdefault(name, not is_text(dataset.features[name]))
        return traits, out


def source_rows(dataset: Dataset) -> Sequence[int]:
    """The number of each row in the data set from which a shuffle or a selection took it."""
    # `datasets` has no public access to it, and a column with numbers would be passed to every reader of the rows.
    indices = indices_of(dataset)
    return range(len(dataset)) if indices is None else indices.column(0).to_pylist()


def _looked_at(
    dataset: Dataset, layout: Layout, images: str | None, folders: tuple[Path, ...]
) -> Iterator[tuple[int, dict[str, Any], RowImages]]:
    """The rows that have to be checked in Python, with their places; of plain text, only suspicious rows."""
    columns = [*layout.reads, *([] if images is None else [images])]
    tables: Any = dataset.select_columns(columns).with_format("arrow").iter(batch_size=BATCH)
    first = 0
    for table in tables:
        suspect = _suspects(table, dataset.features, layout)
        places = np.flatnonzero(suspect).tolist()
        if places:
            counts = [0] * len(table) if images is None else _counts(table, dataset.features, images)
            rows = plain_rows(table.select(list(layout.reads)).take(places), dataset.features)
            for place, row in zip(places, rows, strict=True):
                read = _reads_images(table, dataset.features, images, place)
                yield first + place, row, RowImages(images is not None, counts[place], read, folders)
        first += len(table)


def _counts(table: pa.Table, features: Features, column: str) -> list[int]:
    return image_counts(table.column(column), features[column])


def _reads_images(table: pa.Table, features: Features, column: str | None, place: int) -> Callable[[], list[Any]]:
    def read() -> list[Any]:
        if column is None:
            return []
        return image_lists(table.column(column).slice(place, 1), feature=features[column])[0].as_py()

    return read


def _suspects(table: pa.Table, features: Features, layout: Layout) -> np.ndarray:
    """The rows of a table that may have to be changed or left out, computed in Arrow without Python values."""
    suspect = np.zeros(len(table), dtype=bool)
    # If one of prompt and completion is text and the other messages, the text becomes a message.
    suspect[:] = len({is_text(features[name]) for name in layout.reads if name in CHATS}) > 1
    for name in layout.reads:
        feature = features[name]
        if layout.as_is and name in ("text", "prompt", "completion") and is_text(feature):
            suspect |= _blank(table.column(name))
        elif layout.as_is and layout.mark is None and not layout.parts and _is_plain_chat(feature):
            suspect |= _odd_chats(table.column(name).combine_chunks(), name)
        else:
            suspect[:] = True
    return suspect


def _odd_chats(column: Any, name: str) -> np.ndarray:
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    flat_, parents = column.flatten(), np.asarray(pc.call_function("list_parent_indices", [column]))
    role, content = flat_.field("role"), flat_.field("content")
    roles = [pc.call_function("equal", [role, pa.scalar(known, role.type)]) for known in ROLES]
    known_role = np.any([np.asarray(equal.fill_null(False)) for equal in roles], axis=0)
    has_text, null = ~_blank(content), np.asarray(content.is_null())
    marked = pc.call_function("match_substring", [content], pc.MatchSubstringOptions(IMAGE_MARK))
    user, assistant = (np.asarray(roles[ROLES.index(speaker)].fill_null(False)) for speaker in ("user", "assistant"))
    odd = ~known_role | null | (user & ~has_text) | np.asarray(marked.fill_null(False))
    suspect = np.bincount(parents[odd], minlength=len(column)) > 0
    answered = np.bincount(parents[assistant & has_text], minlength=len(column)) > 0
    lengths = np.bincount(parents, minlength=len(column))
    return suspect | (lengths == 0) | (~answered if name != "prompt" else False)


def _blank(column: Any) -> np.ndarray:
    trimmed = pc.call_function("utf8_trim_whitespace", [column])
    empty = pc.call_function("equal", [pc.call_function("binary_length", [trimmed]), pa.scalar(0)])
    return np.asarray(empty.fill_null(True))


def is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _is_plain_chat(feature: Any) -> bool:
    inner = feature.feature if isinstance(feature, List | LargeList) else None
    return isinstance(inner, dict) and inner.keys() == {"role", "content"} and all(map(is_text, inner.values()))


def _has_nulls(features: Features, layout: Layout) -> bool:
    return not any(has_json(features[name]) for name in layout.reads)


def _alike(ours: Any, theirs: Any) -> bool:
    """Whether values of two types are equal in Python; the types may differ in their maximal length."""
    if isinstance(ours, List) and isinstance(theirs, List | LargeList):
        return _alike(ours.feature, theirs.feature)
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(_alike(ours[key], theirs[key]) for key in ours)
    return ours == theirs or (is_text(ours) and is_text(theirs))


def _differs(row: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    return any(name in row and without_nulls(row[name]) != without_nulls(ours[name]) for name in ours)


def _without(count: int, out: set[int]) -> list[int]:
    return [place for place in range(count) if place not in out]


def _convert(
    table: pa.Table,
    layout: Layout,
    traits: DatasetTraits,
    source: Features,
    features: Features,
    images: str | None,
    folders: tuple[Path, ...],
    image_folder: str | None,
    version: int,
) -> pa.Table:
    """A batch in TRL's columns. It stays in Arrow, so that no image is decoded."""
    counts = [0] * len(table) if images is None else _counts(table, source, images)
    nulls = _has_nulls(source, layout)
    rows, pictures = [], []
    for place, row in enumerate(plain_rows(table.select(list(layout.reads)), source)):
        own = RowImages(images is not None, counts[place], _reads_images(table, source, images, place), folders)
        ours = canonical_row(row, layout, own, nulls=nulls)
        brought = ours.pop("images", None)
        if traits.brought:
            pictures.append([image and stored(image, folders) for image in own.read()] if brought is None else brought)
        rows.append(finished(ours, layout, traits, counts[place] if brought is None else len(brought)))
    arrays: dict[str, Any] = {}
    for name, feature in features.items():
        type_ = storage(features.arrow_schema.field(name).type)
        if name == "images" and traits.brought:
            arrays[name] = pa.array(pictures, type=type_)
        elif name == "images" and traits.images:
            column = str(images)
            # Embedded as bytes, which every reader decodes; base64 in the field of a path is our own convention.
            arrays[name] = image_lists(table.column(column), image_folder, feature=source[column], embed=True)
        elif name in OURS:
            arrays[name] = pa.array([encoded_json(row.get(name), feature) for row in rows], type=type_)
        else:
            arrays[name] = table.column(name)
    return pa.table(arrays)


def aligned(parts: Sequence[Dataset]) -> list[Dataset]:
    """Data sets of one source with common columns and types, wide enough for the rows of each."""
    widest: dict[str, Any] = {}
    for part in parts:
        for name, feature in part.features.items():
            if name not in widest or isinstance(getattr(feature, "feature", None), Json):
                widest[name] = feature
            elif isinstance(feature, List) and feature != widest[name] and not _is_json_list(widest[name]):
                widest[name] = List(Json())
    features = Features(widest)
    return [part if part.features == features else _widened(part, features) for part in parts]


def _is_json_list(feature: Any) -> bool:
    return isinstance(getattr(feature, "feature", None), Json)


def _widened(dataset: Dataset, features: Features) -> Dataset:
    return (
        dataset.with_format("arrow")
        .map(
            _widen,
            batched=True,
            batch_size=BATCH,
            fn_kwargs={"source": dataset.features, "features": features},
            features=features,
            remove_columns=dataset.column_names,
        )
        .with_format(None)
    )


def _widen(table: pa.Table, source: Features, features: Features) -> pa.Table:
    arrays: dict[str, Any] = {}
    for name, feature in features.items():
        type_ = storage(features.arrow_schema.field(name).type)
        if name not in source:
            arrays[name] = pa.array([[] if name == "images" else None] * len(table), type=type_)
        elif source[name] == feature or not _is_json_list(feature):
            arrays[name] = table.column(name)
        else:
            rows = plain_rows(table.select([name]), source)
            arrays[name] = pa.array([encoded_json(without_nulls(row[name]), feature) for row in rows], type=type_)
    return pa.table(arrays)
