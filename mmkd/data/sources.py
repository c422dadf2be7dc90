"""Loading of a recipe's source: local files, a folder written by `save_to_disk`, or a data set on the Hub."""

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import datasets
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetNotFoundError, DatasetsError

from mmkd.errors import UserError, nearest

from .data_recipe import BUILDERS
from .image_folders import read_image_folder
from .table_files import READERS, read_table_files

KINDS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
KINDS |= {".arrow": "arrow", ".txt": "text", ".tar": "webdataset"}
"""Suffix of a file -> the source that reads it."""

PACKED = (".gz", ".zst", ".bz2", ".xz", ".zip")
"""Suffixes of compressed files, which are read like the file inside."""


class SourceKeys(Protocol):
    """The fields of a recipe that say where its rows are."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def config(self) -> str | None: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def data_files(self) -> Mapping[str, str | tuple[str, ...]]: ...
    @property
    def folder(self) -> Path | None: ...
    @property
    def prepare(self) -> str | None: ...


def load_split(recipe: SourceKeys, split: str) -> Dataset:
    """The rows of one split of the source, unchanged. Raises UserError for a missing file, folder or split."""
    own = recipe.data_files.get(split, ())
    patterns = (own,) if isinstance(own, str) else own
    if recipe.source == "imagefolder":
        return read_image_folder(recipe.name, [image_folder(recipe.name, path, recipe.folder) for path in patterns])
    if recipe.source in BUILDERS:
        files = [
            file for pattern in patterns for file in local_files(recipe.name, pattern, recipe.folder, recipe.prepare)
        ]
        return read_files(recipe.name, recipe.source, files, split)
    folder = _saved_folder(recipe)
    if folder is None:
        files = {split: list(patterns)} if recipe.data_files else None
        return read_hub(recipe.name, recipe.source, recipe.config, recipe.revision, files, split)
    saved = datasets.load_from_disk(str(folder))
    saved = saved if isinstance(saved, DatasetDict) else DatasetDict({"train": saved})
    if split not in saved:
        names = [str(name) for name in saved]
        raise UserError(
            f"{recipe.name}: {folder} has no split {split!r}; did you mean {nearest(split, names)!r}? "
            f"It has {', '.join(names)}; name it under splits."
        )
    return saved[split]


def is_on_hub(recipe: SourceKeys) -> bool:
    """Whether the rows are those of a data set on the Hub. Raises UserError as `load_split` does."""
    return bool(recipe.source) and recipe.source not in BUILDERS and _saved_folder(recipe) is None


def from_elsewhere(recipe: SourceKeys) -> bool:
    """Whether the rows come from the Hub or from a URL, so that somebody else has written them."""
    names = [name for own in recipe.data_files.values() for name in ((own,) if isinstance(own, str) else own)]
    return is_on_hub(recipe) or any("://" in name and not name.startswith("file:") for name in names)


def left_out_note(recipe: SourceKeys, rows: Dataset) -> str:
    """What reading the files has left out, as a sentence; empty for nothing."""
    # Our own readers write it there; data sets of others have their own descriptions.
    return rows.info.description if recipe.source in ("imagefolder", "webdataset") else ""


def read_files(name: str, kind: str, files: Sequence[str], split: str) -> Dataset:
    """The rows of files of one kind. Raises UserError for files of another kind, and for broken or empty ones."""
    for file in files:
        suffixes = [suffix.lower() for suffix in Path(file).suffixes if suffix.lower() not in PACKED]
        is_of = KINDS.get(suffixes[-1]) if suffixes else None
        # Any file can be read as lines of text, so that source: text accepts all suffixes; a .txt may hold anything.
        if is_of not in (None, kind, "text") and kind != "text":
            raise UserError(f"{name}: {file} looks like {is_of}, and not like {kind}; write `source: {is_of}`.")
    if kind in READERS:
        return read_table_files(kind, list(files), split)
    try:
        return datasets.load_dataset(kind, data_files={split: list(files)}, split=split)
    except (DatasetsError, OSError, ValueError) as error:
        shown = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
        raise UserError(f"{name}: {shown} cannot be read as {kind}: {_reason(error)}") from error


def read_hub(
    name: str, source: str, config: str | None, revision: str | None, files: Mapping[str, Any] | None, split: str
) -> Dataset:
    """The rows of a data set on the Hub. Raises UserError, with the setting to correct, if it cannot be loaded."""
    return _from_hub(name, source, config, revision, files, split)


def hub_splits(source: str, config: str | None, revision: str | None) -> list[str]:
    """The splits of a data set on the Hub, which is downloaded. Raises UserError as `read_hub` does."""
    rows = _from_hub(source, source, config, revision, None, None)
    return [str(split) for split in rows]


def _from_hub(
    name: str,
    source: str,
    config: str | None,
    revision: str | None,
    files: Mapping[str, Any] | None,
    split: str | None,
) -> Any:
    try:
        return datasets.load_dataset(source, name=config, revision=revision, data_files=files, split=split)
    except DatasetNotFoundError as error:
        if "gated" in str(error):
            raise UserError(
                f"{name}: {source} is gated. Accept its terms at https://huggingface.co/datasets/{source} and log in "
                "with `hf auth login`, or set HF_TOKEN."
            ) from error
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"{name}: the Hub has no data set {source}{at} that you may read. Correct `source` (or `revision`); if "
            "it is private, log in with `hf auth login`."
        ) from error
    except ConnectionError as error:
        raise UserError(
            f"{name}: {source} is not on this machine, and the Hub cannot be reached ({_reason(error)}). Unset "
            "HF_HUB_OFFLINE where it is set, run once with a network (rows are kept in HF_HOME), or write `source: "
            "parquet` and `data_files:` for files that you have."
        ) from error
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        if "Config name is missing" in str(error):
            names = str(error).partition("[")[2].partition("]")[0].replace("'", "")
            raise UserError(
                f"{name}: {source} has several configs: {names}. Choose one: `config:` in a data recipe, or "
                f"data: {source}:CONFIG."
            ) from error
        raise UserError(
            f"{name}: split {split!r} of {source} cannot be read: {_reason(error)} Correct `splits`, `config` or "
            "`data_files`."
        ) from error


def local_files(name: str, path: str, folder: Path | None, prepare: str | None) -> list[str]:
    """The files of a path or glob, in the current folder or else the YAML's. Raises UserError if there are none."""
    if "://" in path:
        return [path]
    for place in _places(path, folder):
        files = [str(place)] if place.is_file() else sorted(glob.glob(str(place), recursive=True))
        files = [file for file in files if Path(file).is_file()]
        if files:
            return files
    places = _places(path, folder)
    hint = f"make it with `{prepare}`" if prepare else "check the path under data_files"
    inside = next((place for place in places if place.is_dir()), None)
    if inside is not None:
        raise UserError(f"{name}: {inside} is a folder; for the files in it write {path.rstrip('/')}/*.jsonl or so.")
    looked = " or ".join(str(place) for place in dict.fromkeys(places))
    raise UserError(f"{name}: there is no file {looked}; {hint}.")


def image_folder(name: str, path: str, folder: Path | None) -> Path:
    """The folder of pictures at a path, in the current folder or else the YAML's. Raises UserError without one."""
    places = _places(path, folder)
    # Relative as it is written, so that rows are the same wherever the current folder lies.
    place = next((place for place in (Path(path).expanduser(), *places) if place.is_dir()), None)
    if place is None:
        looked = " or ".join(str(place) for place in dict.fromkeys(places))
        raise UserError(f"{name}: there is no folder {looked}; source imagefolder reads folders of pictures.")
    return place


def _places(path: str, folder: Path | None) -> list[Path]:
    # A user's script writes files to the current folder; files that are shared with a YAML lie beside it.
    folders = (Path.cwd(), folder) if path != "." else (folder, Path.cwd())
    return [place / Path(path).expanduser() for place in folders if place is not None]


def _saved_folder(recipe: SourceKeys) -> Path | None:
    """The folder written by `save_to_disk`, or None for a source on the Hub. Raises UserError if it is neither."""
    folders = [place for place in _places(recipe.source, recipe.folder) if place.is_dir()]
    folder = next((place for place in folders if is_saved(place)), next(iter(folders), None))
    if folder is None:
        looks_like_path = recipe.source.startswith((".", "/", "~")) or recipe.source.count("/") != 1
        if looks_like_path:
            hint = f"did you mean {nearest(recipe.source, BUILDERS)!r}? " if "/" not in recipe.source else ""
            raise UserError(
                f"{recipe.name}: source {recipe.source!r} is no folder here; {hint}A source is owner/name on the Hub, "
                f"one of {', '.join(BUILDERS)}, or a folder that save_to_disk wrote."
            )
        return None
    if not is_saved(folder):
        raise UserError(
            f"{recipe.name}: {folder} was not written by save_to_disk; for the files in it write "
            f"`source: parquet` (or {', '.join(BUILDERS)}) and `data_files:`."
        )
    unused = [key for key in ("config", "revision", "data_files") if getattr(recipe, key)]
    if unused:
        raise UserError(f"{recipe.name}: {', '.join(unused)} cannot apply to the saved folder {folder}; remove it.")
    return folder


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _reason(error: BaseException) -> str:
    """The first line of the innermost error; the errors that `datasets` wraps around it have no information."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")[:300] + "."
