"""What a path, glob or Hub id holds: files of one kind by split, a saved folder, pictures, or data on the Hub."""

import glob
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from mmkd.errors import UserError
from mmkd.units import with_noun

from .image_folders import METADATA
from .images import IMAGE_SUFFIXES
from .sources import KINDS, PACKED, is_saved

HUB_ID = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(?::(?P<config>[^@:]+))?(?:@(?P<revision>[\w./-]+))?")
"""owner/name, with the config after a colon and the revision after an at sign."""

_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
    # For methods that learn from rows without labels.
    "unlabeled": ("unlabeled", "unlabelled"),
}
# Files beside the rows that describe them or the repository.
_ABOUT = re.compile(r"(dataset_infos?|dataset_dict|state|README|LICEN[CS]E|classes|labels)\.(json|txt)", re.IGNORECASE)
_SHOWN = 5


@dataclass(frozen=True)
class Container:
    """Where the rows of a source are."""

    source: str
    """The `source` of its data recipe: a kind of file, a folder of `save_to_disk`, or owner/name on the Hub."""
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Paths and globs of the files of each split."""
    splits: tuple[str, ...] = ()
    """The splits, where they are known before the rows are read."""
    config: str | None = None
    revision: str | None = None
    base: Path | None = None
    """The folder in which the paths start, if not the current one."""
    notes: tuple[str, ...] = ()
    """What a user should know about the choice of files, as sentences."""

    @property
    def on_hub(self) -> bool:
        """Whether it is a data set on the Hub."""
        return not self.files and not self.splits


def container_of(source: str, base: Path | None = None) -> Container | None:
    """What a source holds; None if it is neither here nor written like a Hub id.

    Paths start at the current folder or else at `base`. Raises UserError for files that cannot be rows.
    """
    if "://" in source:
        return Container(_kind_of(source, source), {"train": (source,)})
    for folder in (None, base):
        place = (folder or Path.cwd()) / Path(source).expanduser()
        if place.is_dir():
            return _of_folder(_tidy(source), place, folder)
        if place.is_file():
            return Container(_kind_of(source, place.name), {"train": (_tidy(source),)}, base=folder)
        matches = _matches(source, folder)
        if matches:
            return _of_files(source, matches, folder, pattern=source)
    match = HUB_ID.fullmatch(source)
    if match is None or _suffix(source) in {*KINDS, *IMAGE_SUFFIXES}:
        return None
    return Container(match["id"], config=match["config"], revision=match["revision"])


def split_of(name: str) -> str | None:
    """The split that a name of a folder, file or split says, such as train for train_sft; None if it says none."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for split, known in _SPLIT_WORDS.items() if any(word in known for word in words)), None)


def _tidy(source: str) -> str:
    return source if source.startswith("~") else str(PurePosixPath(source))


def _suffix(name: str) -> str:
    """The last suffix of a name before those of compression."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes if suffix.lower() not in PACKED]
    return suffixes[-1] if suffixes else ""


def _kind_of(source: str, name: str) -> str:
    kind = KINDS.get(_suffix(name))
    if kind is not None:
        return kind
    if _suffix(name) in IMAGE_SUFFIXES:
        raise UserError(f"data: {source} is one picture. Name the folder that holds the pictures.")
    packed = " Unpack it and name the folder." if name.endswith((".zip", ".7z", ".rar")) else ""
    raise UserError(
        f"data: {source} is no file of rows that mmkd reads.{packed} Rows are read from files that end in "
        f"{', '.join(KINDS)}. For another name, write a data recipe (.yaml) with `source:` and `data_files:`."
    )


def _matches(pattern: str, base: Path | None) -> list[str]:
    """The files of a glob as it spells them."""
    root = str(base) if base is not None else None
    files = sorted(glob.glob(str(Path(pattern).expanduser()), root_dir=root, recursive=True))
    return [file for file in files if ((base or Path()) / file).is_file()]


def _of_folder(source: str, place: Path, base: Path | None) -> Container:
    if is_saved(place):
        return Container(source, splits=_saved_splits(place), base=base)
    files = [f"{source}/{path}" for path in _files_below(place)]
    if not files:
        raise UserError(f"data: the folder {source} is empty.")
    tables = [file for file in files if _suffix(file) in KINDS and not _ABOUT.fullmatch(Path(file).name)]
    images = sum(_suffix(file) in IMAGE_SUFFIXES for file in files)
    if images and all(Path(file).name in METADATA or KINDS[_suffix(file)] == "text" for file in tables):
        return _of_images(source, place, base)
    if not tables:
        suffixes = Counter(_suffix(file) or "no suffix" for file in files)
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(_SHOWN))
        raise UserError(
            f"data: the folder {source} has no rows that mmkd reads; it holds {kinds}. Rows are files that end in "
            f"{', '.join(KINDS)}, or folders of pictures."
        )
    container = _of_files(source, tables, base)
    others = len(files) - sum(map(len, _expanded(container, base))) - images
    if others:
        note = f"Not read: {with_noun(others, 'other file')} in {source}."
        return replace(container, notes=(*container.notes, note))
    return container


def _files_below(place: Path) -> list[str]:
    """The files in a folder and its folders, without hidden ones, as relative paths."""
    paths = (path.relative_to(place) for path in place.rglob("*") if path.is_file())
    visible = [path for path in paths if not any(part.startswith((".", "__MACOSX")) for part in path.parts)]
    return sorted(path.as_posix() for path in visible)


def _saved_splits(place: Path) -> tuple[str, ...]:
    if not (place / "dataset_dict.json").is_file():
        return ("train",)
    return tuple(json.loads((place / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])


def _of_files(source: str, files: Sequence[str], base: Path | None, pattern: str | None = None) -> Container:
    """Files of one kind, by split. Raises UserError for files of several kinds."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for file in files:
        kinds[_kind_of(file, file)].append(file)
    if len(kinds) > 1 and "text" in kinds and pattern is None:
        # Notes and lists beside the rows; a folder of texts alone is data. They are counted with the other files.
        del kinds["text"]
    if len(kinds) > 1:
        held = " and ".join(f"{len(names)} {kind} ({names[0]})" for kind, names in kinds.items())
        name, suffix = source.rstrip("/"), _suffix(next(iter(kinds.values()))[0])
        raise UserError(
            f"data: {source} holds files of several kinds: {held}. Name those to read, such as "
            f"{name if pattern is None else '.'}/*{suffix}."
        )
    ((kind, names),) = kinds.items()
    by_split, note = _by_split(names, source)
    root = None if pattern is not None else source
    patterns = {split: _pattern(own, root, pattern, base) for split, own in by_split.items()}
    return Container(kind, patterns, base=base, notes=(note,) if note else ())


def _by_split(files: Sequence[str], source: str) -> tuple[dict[str, list[str]], str | None]:
    """The files of each split, by the names of files and folders, and a sentence about those that are unclear."""
    said = {file: _split_of_file(file, source) for file in files}
    if len(set(said.values())) == 1:
        return {"train": list(files)}, None
    splits: dict[str, list[str]] = {}
    for file in files:
        splits.setdefault(said[file] or "train", []).append(file)
    if "train" not in splits:
        raise UserError(
            f"data: the files of {source} are named for {' and '.join(splits)}, and none for train. Name the files "
            "to train on."
        )
    unnamed = [file for file in files if said[file] is None]
    note = f"{_listed(unnamed)} {'is' if len(unnamed) == 1 else 'are'} read as train, by exclusion."
    return splits, note if unnamed else None


def _split_of_file(file: str, source: str) -> str | None:
    path = PurePosixPath(file)
    inside = path.relative_to(source).parts if path.is_relative_to(source) else (path.name,)
    words = {word: split for split, known in _SPLIT_WORDS.items() for word in known}
    folder = next((words[part.lower()] for part in inside[:-1] if part.lower() in words), None)
    return folder or split_of(inside[-1].partition(".")[0])


def _pattern(files: Sequence[str], root: str | None, pattern: str | None, base: Path | None) -> tuple[str, ...]:
    """A glob that gives these files and no others, where there is a simple one, or else the files."""
    if len(files) == 1:
        return (files[0],)
    candidates = [pattern] if pattern is not None else []
    if root is not None:
        ending = "".join(
            PurePosixPath(files[0]).suffixes[-2:] if _is_packed(files[0]) else PurePosixPath(files[0]).suffixes[-1:]
        )
        tops = {PurePosixPath(file).relative_to(root).parts[0] for file in files}
        stem = re.match(r"[A-Za-z]*", PurePosixPath(files[0]).name)
        candidates += [f"{root}/*{ending}", f"{root}/**/*{ending}"]
        candidates += [f"{root}/{top}/**/*{ending}" for top in tops if len(tops) == 1]
        candidates += [f"{root}/{stem[0]}*{ending}"] if stem and stem[0] else []
    return next(((candidate,) for candidate in candidates if _matches(candidate, base) == sorted(files)), tuple(files))


def _is_packed(file: str) -> bool:
    return Path(file).suffix.lower() in PACKED


def _expanded(container: Container, base: Path | None) -> Iterable[list[str]]:
    return ([file for name in names for file in _matches(name, base) or [name]] for names in container.files.values())


def _of_images(source: str, place: Path, base: Path | None) -> Container:
    """A folder of pictures: one folder per split if its folders are named so, or else all for train."""
    folders = sorted(path.name for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))
    words = {word: split for split, known in _SPLIT_WORDS.items() for word in known}
    said = {name: words.get(name.lower()) for name in folders}
    if folders and "train" in said.values() and None not in said.values():
        return Container("imagefolder", {str(said[name]): (f"{source}/{name}",) for name in folders}, base=base)
    return Container("imagefolder", {"train": (source,)}, base=base)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
