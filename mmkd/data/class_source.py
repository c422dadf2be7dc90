"""The recipe of classes of a folder, a file, a glob or a Hub id that is named in place of one."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset, Image

from mmkd.errors import UserError
from mmkd.shipped import list_recipes
from mmkd.units import with_noun

from .classification import ClassificationRecipe
from .containers import Container, container_of
from .direct_source import chosen_splits, image_folder_of, source_names
from .sources import load_split

HELD_OUT = 0.1
"""The share of the smallest class that is held out of every class where there is no split for it."""

MOST_HELD_OUT = 50
FEWEST_ROWS = 5
"""With fewer rows of a class than this, none is held out."""

_LABELS = ("label", "labels", "class", "class_name", "category", "target", "cls", "fine_label", "topic", "intent")
_IMAGES = ("image", "img", "picture", "photo", "jpg", "png")
_TEXTS = ("text", "sentence", "content", "review", "body", "document", "tweet", "title", "question")
_NAME_FILES = ("classes.txt", "class_names.txt", "classnames.txt", "labels.txt")
_MOST_CLASSES = 2000


class ClassColumns(NamedTuple):
    """The columns of rows with one class each."""

    content: str
    label: str
    is_image: bool


def direct_classes(source: str, *, base: Path | None = None) -> ClassificationRecipe | None:
    """The recipe of classes of a path, glob or Hub id; None for the name of a recipe.

    Where there is neither a validation nor a test split, a tenth of the smallest class is held out of each class, at
    most 50 rows. Raises UserError for rows without classes.
    """
    name = source.removeprefix("data_recipes/").removesuffix(".yaml")
    if source.endswith((".yaml", ".yml")) or f"{name}.yaml" in list_recipes("data_recipes"):
        return None
    if source.startswith("classification/") and not Path(source).exists():
        # A misspelt name of a shipped recipe.
        return None
    container = container_of(source, base)
    if container is None or (container.on_hub and source.count("/") != 1):
        return None
    try:
        return _recipe(source, container)
    except UserError as error:
        if container.on_hub:
            raise UserError(f"There is no file or folder {source} here. On the Hub: {error}") from error
        raise


def class_columns(rows: Dataset) -> ClassColumns | None:
    """The columns of rows with one class each, or None for other rows."""
    names = rows.column_names
    label = next((name for name in names if isinstance(rows.features[name], ClassLabel)), None)
    label = label or next((name for name in _LABELS if name in names), None)
    if label is None:
        return None
    pictures = [name for name in names if rows.features[name] == Image() or name in _IMAGES]
    if pictures:
        return ClassColumns(pictures[0], label, True)
    texts = [name for name in names if name != label and getattr(rows.features[name], "dtype", None) == "string"]
    text = next((name for name in _TEXTS if name in texts), texts[0] if len(texts) == 1 else None)
    return None if text is None else ClassColumns(text, label, False)


def _recipe(source: str, container: Container) -> ClassificationRecipe:
    splits, notes = chosen_splits(source_names(container), source)
    keys: dict[str, Any] = {
        "name": source,
        "source": container.source,
        "config": container.config,
        "revision": container.revision,
        "data_files": container.files,
        "splits": splits,
        "folder": container.base,
    }
    # What is classified is not known before its rows are read, and a recipe must name it.
    rows = load_split(ClassificationRecipe(**keys, image="image"), splits["train"])
    columns = class_columns(rows)
    if columns is None:
        raise UserError(
            f"{source}: no column holds classes; the columns are {', '.join(rows.column_names)}. Name the right ones "
            "`label` and `image` or `text`, or write a data recipe with `label:` and `image:` or `text:`."
        )
    folder = image_folder_of(rows.select_columns([columns.content]), container, is_picture=columns.is_image)
    keys |= {
        "image_folder": folder,
        ("image" if columns.is_image else "text"): columns.content,
        "label": columns.label,
    }
    names, said = _class_names(source, rows, columns.label, container)
    recipe = ClassificationRecipe(**keys, class_names=names)
    looked_up = (f"Pictures are looked up in {folder}.",) if folder is not None else ()
    notes = (*container.notes, *notes, *said, *looked_up)
    if "validation" in splits or "test" in splits:
        return replace(recipe, notes=notes)
    fewest = min(Counter(rows.with_format(None)[columns.label]).values())
    held_out = None if fewest < FEWEST_ROWS else min(MOST_HELD_OUT, max(1, round(HELD_OUT * fewest)))
    if held_out is None:
        note = f"No row is held out, because a class has fewer than {FEWEST_ROWS} rows."
    else:
        held = f"{with_noun(held_out, 'row')} of each class {'is' if held_out == 1 else 'are'} held out for validation"
        note = f"{held}, because there is no split for it."
    return replace(recipe, validation_per_class=held_out, notes=(*notes, note))


def _class_names(
    source: str, rows: Dataset, label: str, container: Container
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the classes, none where the data set declares them, and a sentence about names that are missing."""
    if isinstance(rows.features[label], ClassLabel):
        return (), ()
    values = set(rows.with_format(None)[label])
    if None in values or any(isinstance(value, list | dict) for value in values):
        raise UserError(
            f"{source}: the column {label!r} has rows without one class. Keep the rows with a single class, or put "
            "those without a class into a split `unlabeled` of a data recipe."
        )
    if len(values) > _MOST_CLASSES:
        raise UserError(
            f"{source}: the column {label!r} has {len(values):,} different values, too many for classes. Write a data "
            "recipe with `label:` to name the right column."
        )
    numbers = sorted(int(value) for value in values if str(value).isdecimal())
    if len(numbers) < len(values):
        written = sorted(map(str, values))
        spoken = tuple(name.replace("_", " ") for name in written)
        return spoken if len({*spoken}) == len(written) else tuple(written), ()
    named = _names_in_file(container, numbers[-1] + 1)
    if named is not None:
        return named
    if numbers != list(range(len(numbers))):
        raise UserError(
            f"{source}: the classes in {label!r} are the numbers {_listed(numbers)}, and not 0 to {len(numbers) - 1}. "
            "List their names under `class_names:` in a data recipe, or write names in place of the numbers."
        )
    note = (
        f"The classes have no names and are called 0 to {len(numbers) - 1}. A teacher that reads names, such as CLIP, "
        "needs them: one a line in classes.txt beside the rows."
    )
    return tuple(map(str, numbers)), (note,)


def _names_in_file(container: Container, classes: int) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """The names in a file such as classes.txt beside the rows, if it has at least as many."""
    files = [file for paths in container.files.values() for file in paths]
    folder = (container.base or Path()) / Path(files[0].partition("*")[0]).parent if files else Path()
    path = next((folder / name for name in _NAME_FILES if (folder / name).is_file()), None)
    if path is None:
        return None
    names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    return (names, (f"The names of the classes are those in {path}.",)) if len(names) >= classes else None


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
