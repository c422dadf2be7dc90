"""Rows as a student will read them: what is learnt from, which pictures they have, and what is left out."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from datasets import Dataset
from PIL import Image

from mmkd.data.arrow import read_rows
from mmkd.data.classification import ClassificationRecipe, load_classification, read_cell
from mmkd.data.data_recipe import DataRecipe
from mmkd.data.image_columns import image_column
from mmkd.data.images import UnreadableImage, read_image
from mmkd.data.load_data import load_rows
from mmkd.data.messages import is_learnt
from mmkd.data.source_description import SourceDescription, describe
from mmkd.data.templates import as_text
from mmkd.errors import UserError

CHECKED_ROWS = 10_000
"""Rows that are read to say what is left out, unless the user asks for more."""

PreviewPicture = Image.Image | str
"""A picture, or the reason why it cannot be read."""


@dataclass(frozen=True)
class PreviewPiece:
    """A piece of a row's text, which is learnt from or only read."""

    text: str
    supervised: bool


@dataclass(frozen=True)
class PreviewRow:
    """One row as the student reads it."""

    pieces: Sequence[PreviewPiece]
    pictures: Sequence[PreviewPicture] = ()
    note: str = ""
    """Its number of tokens, or its class."""


@dataclass(frozen=True)
class DataPreview:
    """A few rows of a source, and what is known of all of them."""

    description: SourceDescription
    rows: Sequence[PreviewRow]
    checked: int
    """Rows that were read to say what is left out."""
    remarks: Sequence[str]
    """What was said while the rows were read: what is left out and why, and the layout."""
    marked: str
    """What the marks in the text say, as a sentence."""


RowReader = Callable[[Dataset], tuple[Sequence[PreviewRow], str]]
"""From rows in TRL's columns to rows to show, and a sentence about what is marked in them."""


def preview_data(
    source: str, *, rows: int = 5, checked: int = CHECKED_ROWS, reader: RowReader | None = None
) -> DataPreview:
    """The first rows of a source, in its own order, as they are written or as `reader` reads them.

    Raises UserError for rows that training would refuse.
    """
    # Loading the rows says the same again.
    with _remarks():
        description = describe(source)
    if description.recipe is None or description.kind == "classes":
        return _classes(description, rows, reader)
    with _remarks() as remarks:
        data = load_rows(_in_order(description.recipe), max_train_rows=checked)["train"]
    shown = data.select(range(min(rows, len(data))))
    read, marked = (reader or as_written)(shown)
    return DataPreview(description, read, len(data), remarks, marked)


def _in_order(recipe: DataRecipe) -> DataRecipe:
    """The recipe with all rows of its source for training, in their order."""
    if recipe.mixture:
        return recipe
    train = {"train": recipe.splits["train"]}
    return replace(recipe, splits=train, shuffle_seed=None, eval_rows=None, eval_fraction=None, notes=())


@contextmanager
def _remarks() -> Iterator[list[str]]:
    """What the package logs meanwhile, in place of its log."""
    remarks: list[str] = []
    logger = logging.getLogger("mmkd.data")
    handler, propagates = logging.Handler(logging.WARNING), logger.propagate
    handler.emit = lambda record: remarks.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield remarks
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


# Rows as they are written


def as_written(rows: Dataset) -> tuple[list[PreviewRow], str]:
    """Rows as their messages or texts, before any chat template."""
    listed = image_column(rows)
    return [_as_written(row) for row in read_rows(listed, listed.column_names)], _marked_as_written(rows)


def _as_written(row: Mapping[str, Any]) -> PreviewRow:
    pictures = [picture_of(image) for image in row.get("images") or []]
    if row.get("text") is not None:
        return PreviewRow([PreviewPiece(row["text"], True)], pictures)
    pieces: list[PreviewPiece] = []
    for column in ("prompt", "messages", "completion"):
        value = row.get(column)
        if isinstance(value, str):
            pieces.append(PreviewPiece(value, column == "completion"))
        for message in value if isinstance(value, list) else []:
            learnt = column != "prompt" and is_learnt(message)
            start = "\n" if pieces else ""
            pieces += [PreviewPiece(f"{start}{message['role']}: ", False), PreviewPiece(_said(message), learnt)]
    return PreviewRow(pieces, pictures)


def _said(message: Mapping[str, Any]) -> str:
    """The content of a message, with a mark for each picture and all other keys but its role."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    said = " ".join("<picture>" if part["type"] == "image" else part["text"] for part in parts)
    others = {key: value for key, value in message.items() if key not in ("role", "content") and value is not None}
    return " ".join([*([said] if said else []), *(f"{key}: {as_text(value)}" for key, value in others.items())])


def _marked_as_written(rows: Dataset) -> str:
    if "messages" in rows.column_names:
        return "Marked is what the assistant says, which a run learns with assistant_only_loss: true."
    if "completion" in rows.column_names:
        return "Marked is the answer, which is what a run learns."
    if "prompt" in rows.column_names:
        return "Nothing is marked: the rows have no answers to learn."
    return "Marked is what a run learns: all of the text."


def picture_of(value: Any) -> PreviewPicture:
    """A picture of a row, or the reason why it cannot be read."""
    try:
        return read_image(value)
    except UnreadableImage as error:
        return f"cannot be read: {error}"


# Rows with a class


def _classes(description: SourceDescription, rows: int, reader: RowReader | None) -> DataPreview:
    recipe = description.classes
    assert recipe is not None
    if reader is not None:
        raise UserError(
            f"{description.source} has rows with a class. A classifier reads them as they are shown without --model; "
            "remove it."
        )
    with _remarks() as remarks:
        data = load_classification(_all_rows(recipe))
    shown = []
    for row in islice(read_rows(_spread(data.train, rows), data.train.column_names), rows):
        name = data.class_names[row["label"]]
        note = f"class {name}"
        if recipe.image is None:
            shown.append(PreviewRow([PreviewPiece(row["text"], False)], (), note))
            continue
        try:
            picture: PreviewPicture = read_cell(row["image"], description.source)
        except UserError as error:
            picture = str(error)
        shown.append(PreviewRow([], [picture], note))
    return DataPreview(description, shown, len(data.train), remarks, "A classifier learns the class.")


def _all_rows(recipe: ClassificationRecipe) -> ClassificationRecipe:
    return replace(recipe, splits={"train": recipe.splits["train"]}, validation_per_class=None, notes=())


def _spread(rows: Dataset, count: int) -> Dataset:
    """Rows at equal distances, so that files in the order of their classes show several."""
    step = max(1, len(rows) // max(1, count))
    return rows.select(range(0, len(rows), step))
