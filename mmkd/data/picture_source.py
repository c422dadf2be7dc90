"""The pictures of any data, without their texts: of data recipes, of recipes of classes, and of plain pictures."""

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import datasets
from datasets import Dataset
from PIL import Image

from mmkd.errors import UserError
from mmkd.shipped import find_recipe, list_recipes
from mmkd.units import with_noun
from mmkd.yaml_files import read_yaml

from .bounded_splits import bounded, check_bounds
from .classification import ClassificationRecipe, load_classification
from .data_recipe import DataRecipe
from .image_columns import UNDECODED, download_images, image_column
from .images import UnreadableImage, read_image
from .load_data import load_data
from .named_pictures import check_named_pictures
from .sources import left_out_note, load_split

logger = logging.getLogger(__name__)

_NAMES = ("image", "images", "img", "picture", "photo", "jpg", "jpeg", "png", "webp")
"""Columns with pictures, where their type does not tell."""


@dataclass(frozen=True)
class PictureSplit:
    """The different pictures of some rows."""

    item: ClassVar[str] = "picture"
    rows: Dataset
    """With a column `images` of undecoded pictures."""
    places: tuple[tuple[int, int], ...]
    """Of each picture: its row, and its number in that row."""
    name: str
    notes: tuple[str, ...]
    """What is left out of the rows, in sentences."""
    folder: str | None = None
    """Where relative paths start, if not in the current folder."""

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Image.Image:
        """The picture in RGB. Raises UserError for one that cannot be read."""
        row, place = self.places[number]
        value = self.rows[row]["images"][place]
        try:
            return read_image(value, folder=self.folder)
        except UnreadableImage as error:
            path = value.get("path") if isinstance(value, Mapping) else None
            raise UserError(
                f"The picture of row {row} of {self.name}{f' ({path})' if path else ''} cannot be read: {error}. "
                "Repair it, or remove the row."
            ) from error

    @property
    def identities(self) -> list[Any]:
        """What tells its pictures apart: a hash of the bytes or the path of each."""
        known = picture_identities(self.rows)
        return [known[row][number] for row, number in self.places]

    def chosen(self, numbers: Iterable[int], *notes: str) -> Self:
        """Some of the pictures; the notes say why."""
        places = tuple(self.places[number] for number in numbers)
        return replace(self, places=places, notes=(*self.notes, *notes))


@dataclass(frozen=True)
class Pictures:
    """The pictures of a data source."""

    train: PictureSplit
    held_out: PictureSplit | None


def load_pictures(name: str, *, max_train_rows: int | None = None, max_eval_rows: int | None = None) -> Pictures:
    """The pictures of a data recipe, a recipe of classes, a folder, a file, a glob or a Hub id.

    A row may have several pictures, and none of them is taken twice: questions about one picture are one picture. The
    numbers of rows bound pictures here. What is not used is said in `notes`. Raises UserError where there are no
    pictures.
    """
    check_bounds(max_train_rows=max_train_rows, max_eval_rows=max_eval_rows)
    splits, folder = _rows_of(name)
    train = picture_split(splits["train"], name, "train", folder)
    held_out = picture_split(splits["eval"], name, "eval", folder) if "eval" in splits else None
    return Pictures(*bounded(train, held_out, max_train_rows, max_eval_rows))


def picture_facts(name: str) -> dict[str, Any]:
    """Name, licence, homepage and source of the data."""
    recipe = recipe_of(name)
    return {key: getattr(recipe, key) for key in ("name", "license", "homepage", "source")}


def recipe_of(name: str) -> DataRecipe | ClassificationRecipe:
    """The data recipe of this name, of classes or not. A folder or a file is not asked for classes."""
    shipped = f"{name.removeprefix('data_recipes/').removesuffix('.yaml')}.yaml" in list_recipes("data_recipes")
    if shipped or name.endswith((".yaml", ".yml")):
        keys = read_yaml(find_recipe(name, "data_recipes"))
        if isinstance(keys, dict) and {"image", "label"} & keys.keys():
            return ClassificationRecipe.load(name)
    return DataRecipe.load(name)


def _rows_of(name: str) -> tuple[dict[str, Dataset], str | None]:
    """The rows of each split, with a column `images`, and the folder in which relative paths start."""
    recipe = recipe_of(name)
    if isinstance(recipe, ClassificationRecipe):
        return _of_classes(recipe), None
    bare = _bare(recipe)
    if bare is not None:
        return bare, recipe.image_folder
    lists = {split: image_column(rows) for split, rows in load_data(name).items()}
    for split, rows in lists.items():
        if "images" not in rows.column_names:
            raise UserError(
                f"{name}: the {split} rows have no pictures; their columns are {', '.join(rows.column_names)}. "
                "Name data with a column `image` or `images`, or a folder of pictures."
            )
    return {str(split): rows.select_columns(["images"]) for split, rows in lists.items()}, None


def _of_classes(recipe: ClassificationRecipe) -> dict[str, Dataset]:
    """The pictures of a recipe of classes: those to learn with and without a label, and those of validation."""
    if recipe.image is None:
        raise UserError(
            f"{recipe.name}: these rows are texts; a vision tower learns from pictures.", because="meaning"
        )
    data = load_classification(recipe)
    parts = [part.select_columns(["image"]) for part in (data.train, data.unlabeled) if part is not None]
    rows = {"train": datasets.concatenate_datasets([part.cast(parts[0].features) for part in parts])}
    held_out = data.validation if data.validation is not None else data.test
    if held_out is not None:
        rows["eval"] = held_out.select_columns(["image"])
    return {split: image_column(dataset) for split, dataset in rows.items()}


def _bare(recipe: DataRecipe) -> dict[str, Dataset] | None:
    """The rows of a source that says nothing of texts, as they are; None for those that are read as conversations."""
    if recipe.mixture or recipe.columns:
        return None
    raw = {ours: load_split(recipe, theirs) for ours, theirs in recipe.splits.items()}
    columns = {split: picture_column(rows) for split, rows in raw.items()}
    if any(column is None for column in columns.values()):
        return None
    for note in recipe.notes:
        logger.warning("%s: %s", recipe.name, note)
    rows = {}
    for split, dataset in raw.items():
        column = columns[split]
        assert column is not None
        if note := left_out_note(recipe, dataset):
            logger.warning("%s: %s: %s", recipe.name, split, note)
        alone = dataset.select_columns([column])
        rows[split] = image_column(alone if column in ("image", "images") else alone.rename_column(column, "image"))
        check_named_pictures(recipe, rows[split], split, folder=recipe.image_folder)
        rows[split] = download_images(rows[split]) if recipe.image_urls else rows[split]
    return hold_out_rows(recipe, rows)


def hold_out_rows(recipe: DataRecipe, rows: dict[str, Dataset]) -> dict[str, Dataset]:
    """The rows, with those that a recipe holds out of train where it has no split of them.

    Raises UserError where none is left to train on.
    """
    if "eval" in rows or not recipe.has_eval:
        return rows
    kept = rows["train"].shuffle(seed=recipe.shuffle_seed or 0)
    held = recipe.eval_rows or max(1, round((recipe.eval_fraction or 0) * len(kept)))
    if held >= len(kept):
        raise UserError(f"{recipe.name}: holding out {held} rows leaves none of {len(kept)} to train on.")
    return {"train": kept.select(range(held, len(kept))), "eval": kept.select(range(held))}


def picture_column(rows: Dataset) -> str | None:
    """The column of pictures, by its type or its name."""
    pictures = (datasets.Image(), datasets.List(datasets.Image()), datasets.Image(decode=False), UNDECODED)
    typed = [name for name in rows.column_names if rows.features[name] in pictures]
    named = [name for name in _NAMES if name in rows.column_names]
    return next(iter([*typed, *named]), None)


def picture_split(rows: Dataset, source: str, split: str, folder: str | None = None) -> PictureSplit:
    """The different pictures of rows with a column `images` of lists.

    `source` and `split` name the rows in messages; relative paths start at `folder`. Raises UserError where there is
    no picture.
    """
    seen: set[Any] = set()
    places: list[tuple[int, int]] = []
    without, twice = 0, 0
    for row, images in enumerate(picture_identities(rows)):
        without += all(identity is None for identity in images)
        for number, identity in enumerate(images):
            if identity is None:
                continue
            if identity in seen:
                twice += 1
                continue
            seen.add(identity)
            places.append((row, number))
    if not places:
        raise UserError(f"{source}: none of the {len(rows):,} {split} rows has a picture.")
    notes = []
    if without:
        notes.append(f"{source}: {with_noun(without, f'{split} row')} without a picture left out.")
    if twice:
        notes.append(f"{source}: {len(places):,} different {split} pictures; {twice:,} repetitions left out.")
    return PictureSplit(rows, tuple(places), f"the {split} data of {source}", tuple(notes), folder)


def picture_identities(rows: Dataset) -> list[list[Any]]:
    """What tells the pictures of each row apart, a hash of their bytes or their path; None for no picture."""
    return [[_identity(image) for image in images or []] for images in rows.with_format(None)["images"]]


def _identity(image: Mapping[str, Any] | None) -> Any:
    if image is None:
        return None
    content = image.get("bytes")
    return hashlib.blake2b(content, digest_size=16).digest() if content is not None else image.get("path") or None
