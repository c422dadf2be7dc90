"""Rows of any layout in TRL's columns: all are checked, and copied only where something has to change."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Features, Image, Json, List, Value

from mmkd.errors import UserError

from .messages import (
    IMAGE_MARK,
    Message,
    Pictures,
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
    """How a source's rows say what TRL's columns say."""

    name: str
    reads: tuple[str, ...]
    """The source's columns that it is made of."""
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    """A row's text, or messages, or prompt and completion, and its tools, as the source has them."""
    unread: tuple[str, ...] = ()
    """Columns that belong to it and are not learnt from, such as rejected answers."""
    mark: str | None = None
    """What stands for an image within a text, where the source says so."""
    parts: bool = False
    """Whether contents are parts also in rows without images."""
    as_is: bool = False
    """Whether its columns are TRL's already."""


@dataclass
class Facts:
    """What all rows of a data set decide together: the types of its columns."""

    images: bool
    """Whether rows have images, in a column or in their messages."""
    brought: bool = False
    """Whether messages bring images."""
    parts: bool = False
    """Whether contents are parts."""
    json: bool = False
    """Whether messages have more than a role and a content of one type."""
    tools: bool = False
    changed: bool = False
    columns: dict[str, bool] = field(default_factory=dict)
    """Column of text or messages -> whether it holds messages."""

    def see(self, row: Mapping[str, Any]) -> None:
        """Takes a canonical row into account."""
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


def canonical_row(row: Mapping[str, Any], layout: Layout, pictures: Pictures, *, nulls: bool) -> dict[str, Any]:
    """A row in TRL's columns, with `images` where its messages bring some.

    Raises UserError for a row that says something else than the layout can say.
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
    """Puts parts where the texts of a row mark its images. Raises UserError for marks where rows have no images."""
    chats = {column: row[column] for column in CHATS if isinstance(row.get(column), list)}
    if placed or not chats:
        return
    mark = layout.mark or IMAGE_MARK
    marks = sum(text.count(mark) for one in chats.values() for message in one for text in texts_of(message))
    told = layout.mark is not None or any(map(marks_images, chats.values()))
    if count is None and marks and told:
        raise UserError(
            f"its text has the mark {mark} of an image, and the rows have no images. Give them in a column `images` "
            "(in a data recipe: map it under columns), or take the mark out of the text"
        )
    if count is not None and (layout.mark is not None or (marks and (marks == count or told))):
        row |= {column: in_parts(messages, 0, mark) for column, messages in chats.items()}


def finished(row: dict[str, Any], layout: Layout, facts: Facts, count: int) -> dict[str, Any]:
    """The row in the types that its data set's facts decide; `count` is how many images it has."""
    chats = {column: row[column] for column in CHATS if isinstance(row.get(column), list)}
    if not facts.images:
        return {**row, **{column: flat(messages) for column, messages in chats.items()}}
    if facts.parts or layout.parts:
        left = 0 if any(map(_has_images, chats.values())) else count
        for column, messages in chats.items():
            chats[column] = in_parts(messages, left)
            left = 0 if column == "prompt" else left
    return {**row, **chats}


def _has_images(messages: Sequence[Message]) -> bool:
    contents = [one.get("content") for one in messages]
    return any(part["type"] == "image" for content in contents if isinstance(content, list) for part in content)


def features_of(facts: Facts, layout: Layout, source: Features, kept: Sequence[str]) -> Features:
    """The types of a data set's columns, ours first."""
    features: dict[str, Any] = {}
    content = PARTS if facts.images and (facts.parts or layout.parts) else Value("string")
    message = Json() if facts.json else {"role": Value("string"), "content": content}
    for column in ("text", *CHATS):
        if column in facts.columns:
            same = source[column] if layout.as_is and column in source else Value("string")
            features[column] = List(message) if facts.columns[column] else same
    if facts.images:
        features["images"] = List(Image())
    if facts.tools:
        features["tools"] = Json()
    return Features({**features, **{name: source[name] for name in kept if name not in features and name in source}})


def image_column_of(columns: Sequence[str], layout: Layout) -> str | None:
    """The column that holds the images of rows, if there is one."""
    return next((name for name in ("images", "image") if name in columns and name not in layout.reads), None)
