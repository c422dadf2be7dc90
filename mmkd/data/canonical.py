"""Conversion of a row of any layout to TRL's columns, and the types of the resulting columns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Features, Image, Json, List, Value

from mmkd.errors import UserError

from .messages import (
    IMAGE_MARK,
    Message,
    RowImages,
    canonical_messages,
    canonical_tools,
    flat,
    in_parts,
    marks_images,
    texts_of,
)

CHATS = ("messages", "prompt", "completion")
OURS = ("text", *CHATS, "images", "tools")
PARTS = List({"type": Value("string"), "text": Value("string")})


@dataclass(frozen=True)
class Layout:
    """The mapping from a source's columns to TRL's columns."""

    name: str
    reads: tuple[str, ...]
    """The source's columns that are read."""
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    """From a row to its text, messages, or prompt and completion, and its tools, in the source's own format."""
    unread: tuple[str, ...] = ()
    """Columns that belong to the layout but are not trained on, such as rejected answers."""
    mark: str | None = None
    """The mark for an image within a text, if the source declares one."""
    parts: bool = False
    """Whether contents are lists of parts in rows without images too."""
    as_is: bool = False
    """Whether the columns are already TRL's."""


@dataclass
class DatasetTraits:
    """Properties of all rows of a data set, which decide the types of its columns."""

    images: bool
    """Whether rows have images, in a column or in their messages."""
    brought: bool = False
    """Whether messages contain images."""
    parts: bool = False
    """Whether contents are lists of parts."""
    json: bool = False
    """Whether messages have other keys than role and content, or contents of several types."""
    tools: bool = False
    changed: bool = False
    columns: dict[str, bool] = field(default_factory=dict)
    """Name of a column -> whether it holds messages rather than text."""

    def see(self, row: Mapping[str, Any]) -> None:
        """Updates the properties with a canonical row."""
        for column in ("text", *CHATS):
            if column not in row:
                continue
            chat = isinstance(row[column], list)
            self.columns[column] = self.columns.get(column, False) or chat
            for message in row[column] if chat else []:
                content = message.get("content")
                self.json |= message.keys() != {"role", "content"}
                if isinstance(content, list):
                    self.parts |= self.images or _has_images([message])
                    self.json |= any(not part.keys() <= {"type", "text"} for part in content)
        self.tools |= row.get("tools") is not None
        self.brought |= row.get("images") is not None


def canonical_row(row: Mapping[str, Any], layout: Layout, pictures: RowImages, *, nulls: bool) -> dict[str, Any]:
    """A row in TRL's columns, with `images` if its messages contain images.

    Raises UserError for a row that does not fit the layout.
    """
    raw = layout.read(row)
    chat = any(isinstance(raw.get(column), list | tuple | np.ndarray) for column in CHATS) or "messages" in raw
    ours: dict[str, Any] = {}
    for column in ("text", *CHATS):
        if column not in raw:
            continue
        value = raw[column]
        if chat and column != "text":
            if isinstance(value, str) and column != "messages":
                value = [{"role": "user" if column == "prompt" else "assistant", "content": value}]
            ours[column] = canonical_messages(value, pictures, nulls=nulls, column=column)
        elif value is None or isinstance(value, str):
            ours[column] = value
        else:
            raise UserError(f"{column} is {value!r:.60}, a value of type {type(value).__name__}, and not text")
    ours["tools"] = canonical_tools(raw.get("tools"), nulls=nulls)
    images = pictures.merged()
    if images is not None:
        ours["images"] = images
    count = pictures.count if images is None else len(images)
    if not pictures.exist and pictures.places and images is None:
        raise UserError(
            f"its messages have places for {len(pictures.places)} images, and the row has none. Give the images in "
            "the parts or in a column `images`"
        )
    _place_images(ours, layout, count if pictures.exist or images else None, bool(pictures.places))
    return ours


def _place_images(row: dict[str, Any], layout: Layout, count: int | None, placed: bool) -> None:
    """Inserts image parts at the marks in the texts of a row. Raises UserError for marks in rows without images."""
    chats = {column: row[column] for column in CHATS if isinstance(row.get(column), list)}
    if placed or not chats:
        return
    mark = layout.mark or IMAGE_MARK
    marks = sum(text.count(mark) for chat in chats.values() for message in chat for text in texts_of(message))
    is_marked = layout.mark is not None or any(map(marks_images, chats.values()))
    if count is None and marks and is_marked:
        raise UserError(
            f"its text has the mark {mark} of an image, and the rows have no images. Give them in a column `images` "
            "(in a data recipe: map it under columns), or take the mark out of the text"
        )
    # A text may contain "<image>" as ordinary text: the mark counts if the source declares it, if it stands on a line
    # of its own as in LLaVA's files, or if there are as many marks as images.
    if count is not None and (layout.mark is not None or (marks and (marks == count or is_marked))):
        row |= {column: in_parts(messages, 0, mark) for column, messages in chats.items()}


def finished(row: dict[str, Any], layout: Layout, traits: DatasetTraits, count: int) -> dict[str, Any]:
    """The row in the types that the traits of its data set require; `count` is its number of images."""
    chats = {column: row[column] for column in CHATS if isinstance(row.get(column), list)}
    if not traits.images:
        return {**row, **{column: flat(messages) for column, messages in chats.items()}}
    if traits.parts or layout.parts:
        unplaced = 0 if any(map(_has_images, chats.values())) else count
        for column, messages in chats.items():
            chats[column] = in_parts(messages, unplaced)
            unplaced = 0 if column == "prompt" else unplaced
    return {**row, **chats}


def _has_images(messages: Sequence[Message]) -> bool:
    contents = [message.get("content") for message in messages]
    return any(part["type"] == "image" for content in contents if isinstance(content, list) for part in content)


def features_of(traits: DatasetTraits, layout: Layout, source: Features, kept: Sequence[str]) -> Features:
    """The types of the columns of a data set: TRL's columns, then the kept columns of the source."""
    features: dict[str, Any] = {}
    content = PARTS if traits.images and (traits.parts or layout.parts) else Value("string")
    message = Json() if traits.json else {"role": Value("string"), "content": content}
    for column in ("text", *CHATS):
        if column in traits.columns:
            same = source[column] if layout.as_is and column in source else Value("string")
            features[column] = List(message) if traits.columns[column] else same
    if traits.images:
        features["images"] = List(Image())
    if traits.tools:
        features["tools"] = Json()
    return Features({**features, **{name: source[name] for name in kept if name not in features and name in source}})


def image_column_of(columns: Sequence[str], layout: Layout) -> str | None:
    """The column that holds the images of rows, or None."""
    return next((name for name in ("images", "image") if name in columns and name not in layout.reads), None)
