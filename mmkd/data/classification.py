"""Classification data: a recipe of images or texts with one class each, its class names, prompts and splits.

One YAML under `data_recipes/classification/` is one data set.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset
from jaxtyping import Int
from PIL import Image

from mmkd.errors import UserError, nearest
from mmkd.schema import NonNegativeInt, PositiveInt, check_fields, shown
from mmkd.shipped import find_recipe
from mmkd.yaml_files import AsWritten, read_yaml

from .data_recipe import BUILDERS
from .images import UnreadableImage, read_image
from .named_pictures import check_named_pictures
from .sources import left_out_note, load_split

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test", "unlabeled", "unseen")
HIDDEN = -100
"""The label of a row whose class may not be used."""


@dataclass(frozen=True)
class ClassificationRecipe:
    """One data set: everything that decides its rows, classes and prompts."""

    name: str = field(metadata={"help": "The file's name unless given."})
    description: str = field(default="", metadata={"help": "What the rows are, in a sentence or two."})
    license: str | None = field(default=None, metadata={"help": "SPDX id, or what its authors say."})
    homepage: str | None = field(default=None, metadata={"help": "Where to read about the data."})
    prepare: str | None = field(default=None, metadata={"help": "The command that writes data_files."})
    source: str = field(
        default="",
        metadata={
            "help": "owner/name on the Hub, a kind of file (json, csv, parquet, arrow, webdataset), imagefolder (a "
            "folder per class), or a folder of save_to_disk."
        },
    )
    config: str | None = field(default=None, metadata={"help": "The Hub data set's config (subset)."})
    revision: str | None = field(default=None, metadata={"help": "The Hub commit; pin one for repeatable rows."})
    data_files: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={"help": "{source split: path(s) or globs}, from the current folder, then the YAML's."},
    )
    splits: Mapping[str, str] = field(
        default_factory=lambda: {"train": "train", "test": "test"},
        metadata={
            "help": "{train|validation|test|unlabeled|unseen: source split}; test is never used for a choice. unseen "
            "has rows of other classes, by name, which are measured only."
        },
    )
    image: str | None = field(default=None, metadata={"help": "The column of images."})
    text: str | None = field(default=None, metadata={"help": "The column of texts, for text classifiers."})
    image_folder: str | None = field(
        default=None, metadata={"help": "Where relative paths of images start: a folder, from the current one."}
    )
    caption: str | None = field(
        default=None,
        metadata={"help": "A column of texts that describe the images, for caption_weight of method dho."},
    )
    label: str = field(default="label", metadata={"help": "The column of classes: numbers from 0, or names."})
    class_names: tuple[str, ...] = field(
        default=(), metadata={"help": "Names in the order of the labels; default: those the data set declares."}
    )
    prompts: tuple[str, ...] = field(
        default=("a photo of a {}.",),
        metadata={"help": "Templates with {} for the class name; a teacher's text features are averaged over them."},
    )
    validation_per_class: PositiveInt | None = field(
        default=None, metadata={"help": "Rows per class to hold out of train where there is no validation split."}
    )
    split_seed: NonNegativeInt = field(default=0, metadata={"help": "Seed of the rows held out for validation."})
    folder: Path | None = field(default=None, compare=False, metadata={"help": "The YAML's folder."})
    notes: tuple[str, ...] = field(default=(), compare=False, metadata={"help": "Sentences to log with the rows."})

    def __post_init__(self) -> None:
        """Raises UserError where fields contradict each other or leave the rows undecided."""
        check_fields(self)
        for key, values in (("splits", self.splits.values()), ("data_files", self._files())):
            strange = next((value for value in values if not isinstance(value, str)), None)
            if strange is not None:
                raise UserError(f"{self.name}: {key} has {shown(strange)}, which is no text; write {{split: text}}.")
        if (self.image is None) == (self.text is None):
            raise UserError(f"{self.name}: set one of image and text: the column that is classified.")
        if not self.source or (self.source in BUILDERS and not self.data_files):
            raise UserError(f"{self.name}: give source: owner/name on the Hub, or json|csv|parquet with data_files.")
        for split in self.splits:
            if split not in SPLITS:
                raise UserError(f"{self.name}: splits has {split!r}; did you mean {nearest(split, SPLITS)!r}?")
        if "train" not in self.splits:
            raise UserError(f"{self.name}: splits names no train split; write splits: {{train: their split}}.")
        if len(set(self.splits.values())) < len(self.splits):
            raise UserError(f"{self.name}: splits reads two of its splits from the same rows; keep them apart.")
        if self.validation_per_class is not None and "validation" in self.splits:
            raise UserError(f"{self.name}: validation_per_class and a validation split exclude each other: keep one.")
        for prompt in self.prompts:
            if prompt.count("{}") != 1:
                raise UserError(f"{self.name}: prompt {prompt!r} needs {{}} once, where the class name goes.")
        twice = [name for name, count in Counter(self.class_names).items() if count > 1]
        if twice:
            raise UserError(f"{self.name}: class_names has {twice[0]!r} twice; no teacher can tell them apart.")

    def _files(self) -> list[Any]:
        values = self.data_files.values()
        return [path for value in values for path in (value if isinstance(value, tuple | list) else [value])]

    @classmethod
    def load(cls, name_or_path: str | Path) -> "ClassificationRecipe":
        """The recipe at a path or that ships under that name, or of rows that are named directly.

        A folder with a folder of pictures per class, a file with a column of classes, and a data set on the Hub may be
        named directly (`mmkd.data.class_source`). Raises UserError for what cannot be read.
        """
        from .class_source import direct_classes

        recipe = direct_classes(str(name_or_path))
        if recipe is not None:
            return recipe
        path = find_recipe(name_or_path, "data_recipes")
        keys = read_yaml(path, as_written=True)
        fields = [field.name for field in dataclasses.fields(cls) if field.name not in ("folder", "notes")]
        if not isinstance(keys, dict):
            raise UserError(f"{path} is no data recipe: it must hold `key: value` lines.")
        for key in keys:
            if key not in fields:
                raise UserError(
                    f"{path.name}: unknown key {key!r}; did you mean {nearest(key, fields)!r}? A recipe of classes "
                    "lies under data_recipes/classification/ and has the keys " + ", ".join(fields) + "."
                )
        for key in ("validation_per_class", "split_seed"):
            if isinstance(keys.get(key), AsWritten):
                keys[key] = keys[key].value
        for key in ("class_names", "prompts"):
            if isinstance(keys.get(key), list):
                keys[key] = tuple(_text(value, f"{path.name}: {key}") for value in keys[key])
        return cls(**{"name": path.stem, **keys, "folder": path.parent})


def _text(value: Any, where: str) -> str:
    if value is None or isinstance(value, bool):
        raise UserError(f"{where} has {value!r}, which YAML does not read as text; put it in quotes.")
    return str(value)


@dataclass(frozen=True)
class ClassificationData:
    """Rows with the columns `image` or `text`, and `label` (a number); what is not there is None."""

    recipe: ClassificationRecipe
    class_names: tuple[str, ...]
    train: Dataset
    validation: Dataset | None
    test: Dataset | None
    unlabeled: Dataset | None
    unseen: Dataset | None = None
    """Rows of classes that no other split has, labelled by their place in `unseen_names`."""
    unseen_names: tuple[str, ...] = ()


def load_classification(
    recipe: ClassificationRecipe, *, max_train_rows: int | None = None, max_eval_rows: int | None = None
) -> ClassificationData:
    """The rows of a recipe.

    Raises UserError for files and columns that are not there, labels of several classes at once, and class names that
    do not match the labels.
    """
    for note in recipe.notes:
        logger.warning("%s: %s", recipe.name, note)
    raw = {ours: _load_split(recipe, theirs) for ours, theirs in recipe.splits.items()}
    for split, dataset in raw.items():
        if note := left_out_note(recipe, dataset):
            logger.warning("%s: %s: %s", recipe.name, split, note)
    class_names = _class_names(recipe, raw["train"])
    unseen_names: tuple[str, ...] = ()
    if "unseen" in raw:
        raw["unseen"] = _with_names(recipe, raw["unseen"])
        unseen_names = _unseen_names(recipe, raw["unseen"], class_names)
    names = {split: unseen_names if split == "unseen" else class_names for split in raw}
    rows = {split: _ours(recipe, dataset, split, names[split]) for split, dataset in raw.items()}
    if recipe.validation_per_class is not None:
        rows["train"], rows["validation"] = _hold_out(recipe, rows["train"], class_names)
    caps = dict.fromkeys(("train", "unlabeled"), max_train_rows)
    caps |= dict.fromkeys(("validation", "test", "unseen"), max_eval_rows)
    for split, cap in caps.items():
        if split in rows and cap is not None and cap < len(rows[split]):
            rows[split] = rows[split].shuffle(seed=recipe.split_seed).select(range(cap))
    parts: Any = {split: rows.get(split) for split in SPLITS}
    return ClassificationData(recipe, class_names, **parts, unseen_names=unseen_names)


def hide_labels(
    labels: Sequence[int] | Int[np.ndarray, "row"],
    class_names: Sequence[str],
    per_class: int | None,
    fraction: float | None,
    seed: int,
) -> Int[np.ndarray, "row"]:
    """The labels with all but a few per class replaced by HIDDEN: `per_class`, or a share of each class.

    The same seed gives the same rows, and those of fewer labels are among those of more. With neither number nothing
    is hidden. Raises UserError for a class without a labelled row, or with fewer than asked for.
    """
    known = np.asarray(labels)
    shown = np.full(len(known), HIDDEN, dtype=np.int64)
    random = np.random.default_rng(seed)
    for number, name in enumerate(class_names):
        rows = random.permutation(np.flatnonzero(known == number))
        if len(rows) == 0:
            raise UserError(
                f"Class {name!r} has no labelled row among {len(known)}: give it one, or take the class's name out."
            )
        count = len(rows)
        if per_class is not None:
            count = per_class
        elif fraction is not None:
            count = max(1, round(fraction * len(rows)))
        if count > len(rows):
            raise UserError(f"Class {name!r} has {len(rows)} rows, so labels_per_class {count} cannot be; lower it.")
        shown[rows[:count]] = number
    return shown


def read_cell(cell: Any, where: str) -> Image.Image:
    """The image of a cell, in any form that `read_image` knows. Raises UserError for one that cannot be read."""
    try:
        return read_image(cell)
    except UnreadableImage as error:
        path = cell.get("path") if isinstance(cell, Mapping) else None
        name = f" ({path})" if path and len(path) < 200 else ""
        raise UserError(
            f"{where}{name} cannot be read as an image: {error}. Repair or remove it; a row is never skipped silently."
        ) from error


def _load_split(recipe: ClassificationRecipe, split: str) -> Dataset:
    if recipe.source in BUILDERS and split not in recipe.data_files:
        raise UserError(f"{recipe.name}: splits asks for {split!r}, which data_files does not list.")
    return load_split(recipe, split)


def _class_names(recipe: ClassificationRecipe, train: Dataset) -> tuple[str, ...]:
    if recipe.label not in train.column_names:
        raise UserError(
            f"{recipe.name}: there is no column {recipe.label!r}; did you mean "
            f"{nearest(recipe.label, train.column_names)!r}?"
        )
    feature = train.features[recipe.label]
    if not isinstance(feature, ClassLabel):
        if not recipe.class_names:
            raise UserError(f"{recipe.name}: {recipe.label!r} declares no names; list them under class_names.")
        return recipe.class_names
    if recipe.class_names and len(recipe.class_names) != len(feature.names):
        raise UserError(
            f"{recipe.name}: class_names has {len(recipe.class_names)} names, the labels are of {len(feature.names)} "
            f"classes ({', '.join(feature.names[:3])}, ...). Give one name per class, in that order."
        )
    return recipe.class_names or tuple(name.replace("_", " ") for name in feature.names)


def _with_names(recipe: ClassificationRecipe, unseen: Dataset) -> Dataset:
    """The rows that training never sees, labelled by the names of their classes."""
    feature = unseen.features.get(recipe.label)
    if not isinstance(feature, ClassLabel):
        return unseen
    names = [feature.names[number].replace("_", " ") for number in unseen.with_format(None)[recipe.label]]
    return unseen.remove_columns(recipe.label).add_column(recipe.label, names)  # pyright: ignore[reportCallIssue]


def _unseen_names(recipe: ClassificationRecipe, unseen: Dataset, class_names: Sequence[str]) -> tuple[str, ...]:
    """The classes of the rows that training never sees, in alphabetical order. Raises UserError for known classes."""
    if recipe.label not in unseen.column_names:
        raise UserError(f"{recipe.name}: unseen has no column {recipe.label!r}, which the other rows have.")
    names = set(unseen.with_format(None)[recipe.label])
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"{recipe.name}: the labels of unseen are no names of classes; write the names.")
    known = sorted(names.intersection(class_names))
    if known or len(names) < 2:
        reason = f"rows of {known[0]!r}, a class that training sees" if known else f"{len(names)} class"
        raise UserError(f"{recipe.name}: unseen has {reason}. It needs rows of two or more other classes.")
    return tuple(sorted(names))


def _ours(recipe: ClassificationRecipe, dataset: Dataset, split: str, class_names: Sequence[str]) -> Dataset:
    """The rows with our columns and checked labels; those of `unlabeled` are hidden."""
    ours, theirs = ("image", recipe.image) if recipe.image is not None else ("text", recipe.text)
    assert theirs is not None
    if theirs not in dataset.column_names:
        raise UserError(
            f"{recipe.name}: {split} has no column {theirs!r}; did you mean {nearest(theirs, dataset.column_names)!r}?"
        )
    labels = [HIDDEN] * len(dataset) if split == "unlabeled" else _labels(recipe, dataset, split, class_names)
    columns = {theirs: ours}
    if recipe.caption is not None and split in ("train", "unlabeled"):
        if recipe.caption not in dataset.column_names:
            raise UserError(
                f"{recipe.name}: {split} has no column {recipe.caption!r} of captions; did you mean "
                f"{nearest(recipe.caption, dataset.column_names)!r}?"
            )
        columns[recipe.caption] = "caption"
    rows = dataset.select_columns([*columns])
    rows = rows.rename_columns({name: new for name, new in columns.items() if name != new})
    if ours == "image" and recipe.image_folder is not None:
        rows = _with_folder(rows, recipe.image_folder)
    if ours == "image":
        # Read by `read_cell`, which can say which row is broken.
        rows = rows.cast_column("image", datasets.Image(decode=False))
        check_named_pictures(recipe, rows, split)
    return rows.add_column("label", labels)  # pyright: ignore[reportCallIssue]


def _with_folder(rows: Dataset, folder: str) -> Dataset:
    """The rows with their relative paths of images joined to a folder; images of other kinds stay."""
    if getattr(rows.features["image"], "dtype", None) != "string":
        return rows
    paths = [path and str(Path(folder) / path) for path in rows["image"][:]]
    return Dataset.from_dict({**{name: rows[name][:] for name in rows.column_names}, "image": paths})


def _labels(recipe: ClassificationRecipe, dataset: Dataset, split: str, class_names: Sequence[str]) -> list[int]:
    values: list[Any] = list(dataset.with_format(None)[recipe.label])
    if any(isinstance(value, (list, tuple, dict)) for value in values[:100]):
        raise UserError(
            f"{recipe.name}: the labels of {split} are lists, so a row can have several classes. DHO's heads choose "
            "one class per row (softmax); keep the rows and the column of a single class."
        )
    if any(isinstance(value, str) for value in values[:100]):
        numbers = _numbers_of_texts(recipe, set(values), split, class_names)
        unknown = next((value for value in values if value not in numbers), None)
        if unknown is not None:
            raise UserError(
                f"{recipe.name}: {split} has the label {unknown!r}, which is none of the class names; did you mean "
                f"{nearest(unknown, list(class_names))!r}?"
            )
        return [numbers[value] for value in values]
    outside = next((value for value in values if value is None or not 0 <= value < len(class_names)), 0)
    if outside != 0 or outside is None:
        raise UserError(
            f"{recipe.name}: {split} has the label {outside}, but there are {len(class_names)} class names, for 0 to "
            f"{len(class_names) - 1}. Give one name per class; rows without a label belong to splits.unlabeled."
        )
    return [int(value) for value in values]


def _numbers_of_texts(
    recipe: ClassificationRecipe, values: set[Any], split: str, class_names: Sequence[str]
) -> dict[str, int]:
    """The classes of labels that are text: names, or numbers, which in CSV are text too."""
    # A folder is named golden_retriever where a person writes golden retriever.
    by_name = {name.replace(" ", "_"): number for number, name in enumerate(class_names)}
    by_name |= {name: number for number, name in enumerate(class_names)}
    if not all(isinstance(value, str) and value.isdecimal() for value in values):
        return by_name
    by_number = {value: int(value) for value in values}
    outside = [value for value, number in by_number.items() if number >= len(class_names)]
    if not values <= by_name.keys():
        if outside:
            raise UserError(
                f"{recipe.name}: {split} has the label {outside[0]}, but there are {len(class_names)} class names, "
                f"for 0 to {len(class_names) - 1}. Give one name per class."
            )
        return by_number
    other = [value for value, number in by_number.items() if number != by_name[value]]
    if other and not outside:
        raise UserError(
            f"{recipe.name}: the label {other[0]!r} of {split} is one class as a name and another as a number from 0. "
            "Write numbers in a JSON or Parquet file, or names in words."
        )
    return by_name


def _hold_out(recipe: ClassificationRecipe, train: Dataset, class_names: Sequence[str]) -> tuple[Dataset, Dataset]:
    labels: Any = train.with_format("numpy")["label"]
    held = hide_labels(np.asarray(labels), class_names, recipe.validation_per_class, None, recipe.split_seed) != HIDDEN
    return train.select(np.flatnonzero(~held)), train.select(np.flatnonzero(held))
