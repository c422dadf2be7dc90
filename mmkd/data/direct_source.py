"""The data recipe of a file, a folder, a glob or a Hub id that is named in place of one."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, List

from mmkd.errors import UserError

from .arrow import read_rows
from .containers import Container, container_of, split_of
from .data_recipe import DataRecipe
from .sources import hub_splits, load_split

HELD_OUT = 0.05
"""The share of rows that is held out for evaluation where the source has no split for it."""

MOST_HELD_OUT = 500
FEWEST_ROWS = 20
"""With fewer rows than this, none is held out."""

_LOOKED_AT = 20
_PICTURE_KEYS = ("image", "images", "image_url", "input_image", "path", "url")


def direct_recipe(source: str, *, base: Path | None = None) -> DataRecipe | None:
    """The data recipe of a path, glob or Hub id; None if `source` is none of them.

    Paths start at the current folder or else at `base`. The layout is recognised when the rows are read. Where the
    source has no split for evaluation, 5 percent of its rows are held out, at most 500, and none of fewer than 20.
    Raises UserError for a source that cannot be read.
    """
    container = container_of(source, base)
    if container is None:
        return None
    if not container.on_hub:
        return _recipe(source, container)
    try:
        return _hub_recipe(source)
    except UserError as error:
        raise UserError(f"There is no file or folder {source} here. On the Hub: {error}") from error


def chosen_splits(names: Sequence[str], source: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Our split -> the source's, of train, validation, test and unlabeled, with sentences about the choice.

    Raises UserError where no split is for training.
    """
    splits: dict[str, str] = {}
    for name in names:
        splits.setdefault(split_of(name) or "", name)
    if "train" in names:
        splits["train"] = "train"
    if "train" not in splits and len(names) == 1:
        splits = {"train": names[0]}
    if "train" not in splits:
        raise UserError(
            f"{source} has the splits {', '.join(names)}, and none is named for training. Choose one in a data recipe "
            "with `source:` and `splits: {train: NAME}`."
        )
    ours = {split: splits[split] for split in ("train", "validation", "test", "unlabeled") if split in splits}
    unread = [name for name in names if name not in ours.values()]
    return ours, (f"Not read: the splits {', '.join(unread)}.",) if unread else ()


def source_names(container: Container) -> Sequence[str]:
    """The names of a source's splits. Raises UserError for a data set that is not on the Hub."""
    if container.on_hub:
        return hub_splits(container.source, container.config, container.revision)
    return container.splits or list(container.files)


@lru_cache(maxsize=64)
def _hub_recipe(source: str) -> DataRecipe:
    """Asked once: a run reads its recipe several times, and the Hub answers slowly."""
    container = container_of(source)
    assert container is not None
    return _recipe(source, container)


def _recipe(source: str, container: Container) -> DataRecipe:
    splits, notes = chosen_splits(source_names(container), source)
    eval_split = splits.get("validation", splits.get("test"))
    for name in [splits[split] for split in ("test", "unlabeled") if split in splits and splits[split] != eval_split]:
        notes = (*notes, f"Not read: the split {name}.")
    recipe = DataRecipe(
        name=source,
        source=container.source,
        config=container.config,
        revision=container.revision,
        data_files=container.files,
        splits={"train": splits["train"], **({} if eval_split is None else {"eval": eval_split})},
        folder=container.base,
    )
    rows = load_split(recipe, splits["train"])
    if eval_split is None:
        held_out = _held_out(len(rows))
        recipe = replace(recipe, eval_rows=held_out)
        notes = (*notes, _held_out_note(len(rows), held_out))
    else:
        notes = (*notes, f"Held out for evaluation: the split {eval_split}.")
    folder = image_folder_of(rows, container)
    if folder is not None:
        recipe = replace(recipe, image_folder=folder)
        notes = (*notes, f"Pictures are looked up in {folder}.")
    return replace(recipe, notes=(*container.notes, *notes))


def _held_out(rows: int) -> int | None:
    return None if rows < FEWEST_ROWS else min(MOST_HELD_OUT, max(1, round(HELD_OUT * rows)))


def _held_out_note(rows: int, held_out: int | None) -> str:
    if held_out is None:
        return f"Nothing is held out for evaluation, because there are fewer than {FEWEST_ROWS} rows."
    are = "is" if held_out == 1 else "are"
    return (
        f"{held_out:,} of {rows:,} rows {are} held out for evaluation, because there is no split for it (5 percent, "
        f"at most {MOST_HELD_OUT}; the same rows every time)."
    )


def image_folder_of(rows: Dataset, container: Container, is_picture: bool = False) -> str | None:
    """The folder in which relative paths of pictures lie, if that is not the current one.

    With `is_picture`, all columns hold pictures whatever they are called.
    """
    paths = [path for path in _picture_paths(rows, is_picture) if not Path(path).is_absolute() and "://" not in path]
    paths = [path for path in paths if len(path) < 300 and not path.startswith("data:")]
    if not paths or any(Path(path).is_file() for path in paths):
        return None
    files = [file for names in container.files.values() for file in names]
    folder = (container.base or Path()) / Path(os.path.dirname(files[0].partition("*")[0]) if files else "")
    candidates = [folder, folder / "images", folder.parent, folder.parent / "images"]
    return next((str(place) for place in candidates if any((place / path).is_file() for path in paths)), None)


def _picture_paths(rows: Dataset, is_picture: bool) -> Iterator[str]:
    """Texts that may be paths of pictures, in the first rows."""
    features = rows.features
    decoded = [name for name, feature in features.items() if feature in (Image(), List(Image()))]
    names = [name for name in rows.column_names if name not in decoded]
    for row in islice(read_rows(rows.select(range(min(len(rows), _LOOKED_AT))), names), _LOOKED_AT):
        yield from _texts_at(list(row.values()) if is_picture else row, is_picture)


def _texts_at(value: Any, is_picture: bool) -> Iterator[str]:
    if isinstance(value, str):
        if is_picture and value:
            yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts_at(item, key in _PICTURE_KEYS)
    elif isinstance(value, list):
        for item in value:
            yield from _texts_at(item, is_picture)
