"""Pictures with their captions, of any data: each different picture once, with everything that is said of it."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from datasets import Dataset
from PIL import Image

from mmkd.errors import UserError
from mmkd.units import with_noun

from .bounded_splits import bounded, check_bounds
from .data_recipe import DataRecipe
from .image_columns import download_images, image_column
from .load_data import load_rows
from .named_pictures import check_named_pictures
from .picture_source import PictureSplit, hold_out_rows, picture_column, picture_identities
from .prompts import text_of
from .sources import left_out_note, load_split

logger = logging.getLogger(__name__)

_LISTED = ("captions", "caption", "texts", "text", "sentences")
"""Columns that may hold several captions of a picture."""


@dataclass(frozen=True)
class CaptionedSplit:
    """The different pictures of some rows, and the captions of each."""

    item: ClassVar[str] = PictureSplit.item
    pictures: PictureSplit
    captions: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, number: int) -> tuple[Image.Image, tuple[str, ...]]:
        """A picture in RGB with its captions. Raises UserError for one that cannot be read."""
        return self.pictures[number], self.captions[number]

    @property
    def name(self) -> str:
        """Of the rows."""
        return self.pictures.name

    @property
    def notes(self) -> tuple[str, ...]:
        """What is left out of the rows, in sentences."""
        return self.pictures.notes

    @property
    def identities(self) -> list[Any]:
        """What tells its pictures apart."""
        return self.pictures.identities

    @property
    def texts(self) -> list[str]:
        """The different captions, in the order in which they come."""
        return list(dict.fromkeys(text for own in self.captions for text in own))

    def chosen(self, numbers: Iterable[int], *notes: str) -> Self:
        """Some of the pictures; the notes say why."""
        numbers = list(numbers)
        captions = tuple(self.captions[number] for number in numbers)
        return replace(self, pictures=self.pictures.chosen(numbers, *notes), captions=captions)


@dataclass(frozen=True)
class CaptionedPictures:
    """The captioned pictures of a data source."""

    train: CaptionedSplit
    held_out: CaptionedSplit | None


def load_captions(
    name: str, *, max_train_rows: int | None = None, max_eval_rows: int | None = None
) -> CaptionedPictures:
    """The captioned pictures of a data recipe, a folder, a file, a glob or a Hub id.

    The caption of a row is its text, or what the assistant answers in it; a column may list several. Rows of one
    picture are joined. The numbers of rows bound pictures here. What is not used is logged. Raises UserError where no
    row has a picture with a caption.
    """
    check_bounds(max_train_rows=max_train_rows, max_eval_rows=max_eval_rows)
    recipe = DataRecipe.load(name)
    listed = _listed_rows(recipe)
    rows, folder = ({str(key): own for key, own in load_rows(recipe).items()}, None) if listed is None else listed
    train = captioned_split(rows["train"], name, "train", folder)
    held_out = captioned_split(rows["eval"], name, "eval", folder) if "eval" in rows else None
    return CaptionedPictures(*bounded(train, held_out, max_train_rows, max_eval_rows))


def captioned_split(rows: Dataset, source: str, split: str, folder: str | None = None) -> CaptionedSplit:
    """The different pictures of rows with captions.

    Rows are as data recipes give them, or have a column `image` or `images` beside one of captions or of lists of
    captions. `source` and `split` name the rows in messages. Raises UserError where no row has a picture with a
    caption.
    """
    rows = image_column(rows)
    if "images" not in rows.column_names:
        raise UserError(
            f"{source}: the {split} rows have no pictures; their columns are {', '.join(rows.column_names)}. Name "
            "data with a column `image` and a caption in a column `text`."
        )
    words: Any = rows.remove_columns(["images"])
    said = [captions_of(row) for row in words] if words.column_names else [()] * len(rows)
    places: dict[Any, tuple[int, int]] = {}
    captions: dict[Any, dict[str, None]] = {}
    counts = {"without a picture": 0, "with several pictures": 0, "without a caption": 0}
    for row, (images, texts) in enumerate(zip(picture_identities(rows), said, strict=True)):
        shown = [number for number, identity in enumerate(images) if identity is not None]
        if len(shown) != 1:
            counts["with several pictures" if shown else "without a picture"] += 1
        elif not texts:
            counts["without a caption"] += 1
        else:
            identity = images[shown[0]]
            places.setdefault(identity, (row, shown[0]))
            captions.setdefault(identity, {}).update(dict.fromkeys(texts))
    notes = [
        f"{source}: {with_noun(count, f'{split} row')} {what} left out." for what, count in counts.items() if count
    ]
    answering = sum(_answers(row) > 1 for row in words)
    if answering:
        notes.append(
            f"{source}: {with_noun(answering, f'{split} row')} of several answers; each is taken for a caption."
        )
    if not places:
        raise UserError(
            f"{source}: none of the {len(rows):,} {split} rows has one picture and a caption. {' '.join(notes)}"
        )
    subject = f"the {split} data of {source}"
    pictures = PictureSplit(rows.select_columns(["images"]), tuple(places.values()), subject, tuple(notes), folder)
    return CaptionedSplit(pictures, tuple(tuple(texts) for texts in captions.values()))


def captions_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What a row says of its picture: its answers, its text, or its list of captions; empty for nothing."""
    if row.get("completion") is not None:
        said = row["completion"]
        said = [said] if isinstance(said, str) else [text_of(message.get("content")) for message in said]
    elif row.get("messages") is not None:
        said = [text_of(each.get("content")) for each in row["messages"] if each.get("role") == "assistant"]
    else:
        said = next((row[name] for name in _LISTED if row.get(name) is not None), [])
        said = [said] if isinstance(said, str) else said
    return tuple(text for text in (str(each).strip() for each in said if each is not None) if text)


def _answers(row: Mapping[str, Any]) -> int:
    """How often the assistant speaks in a row of messages."""
    return sum(each.get("role") == "assistant" for each in row.get("messages") or [])


def _listed_rows(recipe: DataRecipe) -> tuple[dict[str, Dataset], str | None] | None:
    """The rows of a source that lists several captions of a picture, and where paths of pictures start.

    None for those that are read as conversations.
    """
    if recipe.mixture or recipe.columns:
        return None
    raw = {ours: load_split(recipe, theirs) for ours, theirs in recipe.splits.items()}
    shown, said = picture_column(raw["train"]), _listing(raw["train"])
    if shown is None or said is None:
        return None
    rows = {}
    for split, dataset in raw.items():
        if note := left_out_note(recipe, dataset):
            logger.warning("%s: %s: %s", recipe.name, split, note)
        # Names of other columns may be taken.
        alone = dataset.select_columns([shown, said])
        renamed = {ours: theirs for ours, theirs in {shown: "image", said: "captions"}.items() if ours != theirs}
        rows[split] = alone.rename_columns(renamed) if renamed else alone
        check_named_pictures(recipe, rows[split], split, folder=recipe.image_folder)
        rows[split] = download_images(rows[split]) if recipe.image_urls else rows[split]
    return hold_out_rows(recipe, rows), recipe.image_folder


def _listing(rows: Dataset) -> str | None:
    """The column that lists captions."""
    for name in _LISTED:
        if name in rows.column_names:
            value = next((own for own in rows.with_format(None)[name] if own), None)
            if isinstance(value, Sequence) and not isinstance(value, str) and isinstance(value[0], str):
                return name
    return None
