"""Files that rows from elsewhere name as pictures: the rows of a stranger choose no file of this machine."""

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit
from urllib.request import url2pathname

import datasets.config
import pyarrow.compute as pc
from datasets import Dataset, Image, List
from huggingface_hub import constants

from mmkd.errors import UserError

from .arrow import decoded_json
from .image_columns import UNDECODED, image_lists
from .image_urls import is_url
from .images import UnreadableImage, content_of_text
from .sources import SourceKeys, from_elsewhere, is_on_hub

_TYPES = (Image(), Image(decode=False), List(Image()), UNDECODED)
_OURS = ("image", "images")


class PictureKeys(SourceKeys, Protocol):
    """The fields of a recipe that say where its rows and their pictures are."""

    @property
    def image_folder(self) -> str | None: ...


def check_named_pictures(
    recipe: PictureKeys, rows: Dataset, split: str, *, kept: Sequence[str] = (), folder: str | None = None
) -> None:
    """Raises UserError for rows from the Hub or a URL that name a picture outside of their data.

    Theirs are the files that came with the data, and those in the recipe's `image_folder`. Links are followed. Rows of
    files that lie here are their owner's, and may name any file. Relative paths start at `folder`, where the rows do
    not have it in them yet; `kept` are columns under names of the source, which may hold pictures or anything else.
    """
    if not from_elsewhere(recipe):
        return
    roots = [os.path.realpath(root) for root in _folders(recipe)]
    for name in dict.fromkeys((*_OURS, *kept)):
        if name not in rows.column_names:
            continue
        shown = name in _OURS or rows.features[name] in _TYPES
        for text in _texts(rows, name, shown):
            if (shown or _is_file(text)) and not _is_theirs(text, recipe.source, roots, folder or ""):
                raise UserError(_refusal(recipe, split, text))


def _refusal(recipe: PictureKeys, split: str, text: str) -> str:
    shown = text if len(text) <= 200 else f"{text[:200]}..."
    where = f"the image_folder {recipe.image_folder}" if recipe.image_folder is not None else "a folder of the data"
    return (
        f"{recipe.name}: a row of {split} names the picture {shown}, which is not in {where}. Rows that come from "
        "another machine may not choose files of this one. Set `image_folder` in a data recipe to the folder of these "
        "pictures, or remove the row; rows of your own are read from files here (`source: json` or so)."
    )


def _folders(recipe: PictureKeys) -> Iterator[str | Path]:
    """Where pictures of the data may lie."""
    if recipe.image_folder is not None:
        yield recipe.image_folder
    if is_on_hub(recipe):
        yield Path(constants.HF_HUB_CACHE, f"datasets--{recipe.source.replace('/', '--')}")
    # Files that `datasets` fetched and unpacked, under names that are hashes.
    yield Path(datasets.config.DOWNLOADED_DATASETS_PATH)
    yield Path(datasets.config.EXTRACTED_DATASETS_PATH)


def _texts(rows: Dataset, name: str, shown: bool) -> Iterator[str]:
    """What stands in the place of the bytes of pictures; without `shown`, every text of a column that may be one."""
    column: Any = rows.data.column(name)
    feature = rows.features[name]
    if not shown:
        yield from dict.fromkeys(_leaves([decoded_json(value, feature) for value in column.to_pylist()]))
        return
    for chunk in image_lists(column, feature=feature).chunks:
        values = chunk.flatten()
        named = values.filter(pc.call_function("is_null", [values.field("bytes")]))
        yield from (path for path in pc.call_function("unique", [named.field("path")]).to_pylist() if path)


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for own in value.values():
            yield from _leaves(own)
    elif isinstance(value, list):
        for own in value:
            yield from _leaves(own)


def _is_theirs(text: str, source: str, roots: Sequence[str], base: str) -> bool:
    """Whether a text that stands for a picture is none of the files here but the data's own."""
    if is_url(text) or "\0" in text:
        # Of addresses others decide: `image_urls`, and `is_public`. No file has a name with a NUL.
        return True
    if "://" in text and not text.startswith(("data:", "file:")):
        own = (f"hf://datasets/{source}/", f"hf://datasets/{source}@", f"{constants.ENDPOINT}/datasets/{source}/")
        return text.split("::")[-1].startswith(own) and "/../" not in text
    try:
        path = content_of_text(text, base)
    except UnreadableImage:
        return True
    if isinstance(path, bytes):
        return True
    place = os.path.join(_real(os.path.dirname(os.path.abspath(path))), path.name)
    place = os.path.realpath(place) if os.path.islink(place) else place
    return any(place.startswith(f"{root}{os.sep}") for root in roots)


def _is_file(text: str) -> bool:
    return "\0" not in text and os.path.isfile(url2pathname(urlsplit(text).path) if text[:5] == "file:" else text)


@lru_cache(maxsize=10_000)
def _real(folder: str) -> str:
    return os.path.realpath(folder)
