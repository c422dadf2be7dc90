"""Caches on the Hub: upload as Parquet with a card, and download to a folder for training."""

import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # that of the HTTP library the client uses
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import WeakFileLock

from mmkd import __version__
from mmkd.errors import UserError
from mmkd.files import write_file
from mmkd.yaml_files import read_yaml

from .cache_card import DATA_RECIPE, cache_card
from .kept_answers import KEPT, PAIRS, PAIRS_RECIPE, SUMMARY, published
from .manifest import NAME as MANIFEST
from .manifest import Manifest
from .side_files import SIDE_FILES, check_side_files
from .store import LOG, CacheWriter, damaged_shards, read_shard, sha256_of, shard_path

FILE_BYTES = 500_000_000
"""The largest size of a Parquet file, in bytes of shards."""

_BESIDE = (MANIFEST, *SIDE_FILES.values(), DATA_RECIPE, LOG)
_OURS = ("data/", f"{KEPT}/", f"{PAIRS}/", SUMMARY, PAIRS_RECIPE)
_PARQUET = re.compile(r"(?P<split>\w+)-(?P<first>\d+)-(?P<last>\d+)\.parquet")


def push_cache(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    fidelity: Mapping[str, float] | None = None,
    method: str | None = None,
) -> str:
    """Uploads a cache as a data set of the Hub; returns its URL.

    All files become visible in one commit at the end. A repeated push, after an interruption or with another card,
    sends only files that the Hub does not have. `fidelity` and `method` are for the card: see `cache_card`. Raises
    UserError for an incomplete or damaged cache, for a repository with other content, and if the Hub rejects the
    upload.
    """
    folder = Path(folder)
    manifest = _checked(folder)
    api = HfApi(library_name="mmkd", library_version=__version__)
    with explained(repo_id):
        # None means the default of the organisation.
        url = api.create_repo(repo_id, repo_type="dataset", private=private or None, exist_ok=True)
        repo_id = url.repo_id
        is_private = api.repo_info(repo_id, repo_type="dataset").private
        present = api.list_repo_files(repo_id, repo_type="dataset")
    if private and not is_private:
        raise UserError(f"{url} exists and is public. Make it private in its settings, or name another repository.")
    if MANIFEST not in present and {*present} - {".gitattributes", "README.md"}:
        raise UserError(f"{url} is no teacher cache; name another repository.")
    # Before large files are sent, since making the card may fail.
    card = cache_card(folder, manifest, repo_id, _columns(folder, manifest), fidelity, method).encode()
    additions = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, split, numbers in _parquet_files(manifest):
            path = Path(temporary) / name
            _write_parquet(path, folder, manifest, split, numbers)
            additions.append(CommitOperationAdd(f"data/{name}", path))
            with explained(repo_id):
                api.preupload_lfs_files(repo_id, additions[-1:], repo_type="dataset")
            # Written, sent and deleted one by one: all together would need the size of the cache again on this disk.
            if additions[-1].path_or_fileobj == b"":
                path.unlink()
        additions.append(CommitOperationAdd("README.md", card))
        additions += [CommitOperationAdd(name, folder / name) for name in _BESIDE if (folder / name).is_file()]
        additions += [CommitOperationAdd(name, path) for name, path in published(folder).items()]
        ours = {addition.path_in_repo for addition in additions}
        stale = [path for path in present if path not in ours and (path.startswith(_OURS) or path in _BESIDE)]
        with explained(repo_id):
            api.create_commit(
                repo_id,
                [*additions, *map(CommitOperationDelete, stale)],
                commit_message=f"Teacher cache of {manifest.identity['data']['name']}",
                repo_type="dataset",
            )
    return str(url)


def local_cache(name: str, revision: str | None = None) -> Path:
    """The folder of a cache, given as a path or as a Hub id, which is downloaded if necessary.

    A Hub id may name a branch, tag or commit, as in user/name@v1. Downloads are verified and kept under HF_HOME/mmkd
    for later calls, also without a network. Raises UserError if the cache does not exist or cannot be downloaded, and,
    with their names, for damaged files.
    """
    if Path(name).exists():
        return Path(name)
    repo_id, _, pinned = name.partition("@")
    if not is_hub_id(name):
        raise UserError(
            f"The teacher cache {name!r} does not exist. Make it with `mmkd cache build`, or name another folder, or "
            "a Hub id such as user/name."
        )
    with explained(repo_id, f" (and no folder has this name; one to build is written ./{name})"):
        snapshot = snapshot_download(
            repo_id, repo_type="dataset", revision=revision or pinned or None, allow_patterns=list(_BESIDE)
        )
    snapshot = Path(snapshot)
    if not (snapshot / MANIFEST).is_file():
        raise UserError(f"{repo_id} on the Hub is no teacher cache: it has no {MANIFEST}. Correct teacher_cache.")
    # Named by a hash of the manifest, so that a commit that only changes the card causes no download.
    digest = hashlib.sha256((snapshot / MANIFEST).read_bytes()).hexdigest()[:16]
    home = Path(constants.HF_HOME) / "mmkd" / repo_id.replace("/", "--")
    home.mkdir(parents=True, exist_ok=True)
    folder, parquet = home / digest, home / f"{digest}.download"
    # All ranks of a run arrive here at the same time.
    with WeakFileLock(home / f"{digest}.lock"):
        if not _is_whole(folder):
            with explained(repo_id):
                snapshot_download(
                    repo_id,
                    repo_type="dataset",
                    revision=snapshot.name,
                    allow_patterns=["data/*.parquet"],
                    local_dir=parquet,
                )
            _rebuild(repo_id, snapshot, parquet / "data", folder)
        shutil.rmtree(parquet, ignore_errors=True)
    return folder


def is_hub_id(name: str) -> bool:
    """Whether a name, with its @revision if any, has the form of a Hub id and not that of a path."""
    return name.partition("@")[0].count("/") == 1 and not name.startswith((".", "/", "~"))


def _checked(folder: Path) -> Manifest:
    """The manifest of a complete and intact cache. Reads all files."""
    manifest = Manifest.read(folder)
    missing = manifest.missing()
    if missing or manifest.part is not None:
        raise UserError(
            f"The cache {folder} is not complete: {len(missing)} of {len(manifest.planned())} shards are missing"
            + (f", and it is part {manifest.part[0]} of {manifest.part[1]}" if manifest.part is not None else "")
            + ". Run `mmkd cache build` again to go on"
            + (", then `mmkd cache merge`." if manifest.part is not None else ".")
        )
    damaged = [str(shard_path(folder, split, number)) for split, number in damaged_shards(folder, manifest)]
    if damaged:
        raise UserError(
            f"{len(damaged)} shards of the cache are damaged: {', '.join(damaged[:5])}. Run `mmkd cache build` with "
            "the recipe that made it; it repairs just those."
        )
    check_side_files(folder, manifest)
    return manifest


def _parquet_files(manifest: Manifest) -> Iterator[tuple[str, str, list[int]]]:
    """Name, split and shards of each file. Depends only on the manifest, so that repeated pushes have equal files."""
    for split, entries in manifest.shards.items():
        groups: list[list[int]] = []
        size = FILE_BYTES
        for number in sorted(entries):
            size += entries[number].bytes
            if size > FILE_BYTES:
                groups.append([])
                size = entries[number].bytes
            groups[-1].append(number)
        for numbers in groups:
            yield f"{split}-{numbers[0]:05d}-{numbers[-1]:05d}.parquet", split, numbers


def _columns(folder: Path, manifest: Manifest) -> list[str]:
    split, number = manifest.planned()[0]
    return read_shard(folder, split, number, manifest.shards[split][number]).column_names


def _write_parquet(path: Path, folder: Path, manifest: Manifest, split: str, numbers: list[int]) -> None:
    """Writes shards as row groups of one file."""
    entries = manifest.shards[split]
    schema = read_shard(folder, split, numbers[0], entries[numbers[0]]).schema
    try:
        # Nearly all values differ, so that dictionary encoding would only cost time and space.
        with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
            for number in numbers:
                table = read_shard(folder, split, number, entries[number])
                writer.write_table(table, row_group_size=max(1, len(table)))
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}. Make room, or set TMPDIR to a folder with "
            f"{FILE_BYTES:,} bytes free."
        ) from error


def _is_whole(folder: Path) -> bool:
    """Whether a cache is completely rebuilt and all its files have the right size."""
    if not (folder / "dataset_dict.json").is_file():
        return False
    manifest = Manifest.read(folder)
    for split, entries in manifest.shards.items():
        for number, entry in entries.items():
            path = shard_path(folder, split, number)
            if not path.is_file() or path.stat().st_size != entry.bytes:
                return False
    return not manifest.missing()


def _rebuild(repo_id: str, snapshot: Path, parquet: Path, folder: Path) -> None:
    """Writes the missing shards from their Parquet copies; continues after an interruption."""
    published = Manifest.read(snapshot)
    places = _places(repo_id, published, parquet)
    for field, name in SIDE_FILES.items():
        checksum = published.identity["signal"].get(field)
        if checksum is not None and _file_sha256(snapshot / name) != checksum:
            raise UserError(
                f"The {name} of {repo_id} is missing or damaged. Delete {snapshot} to download it again; if that "
                "does not help, whoever pushed it must do so again."
            )
    first = next(iter(places.values()))[0]
    with _damage_named(repo_id, first):
        features = Features.from_arrow_schema(pq.read_schema(first))
    # A new manifest, because another version of Arrow writes files of other sizes.
    ours = Manifest(published.identity, published.shard_rows, published.total_rows)
    with CacheWriter(folder, ours, features) as writer:
        for split, number in writer.manifest.missing():
            path, group = places[split, number]
            with _damage_named(repo_id, path):
                table = pq.ParquetFile(path).read_row_group(group)
                if sha256_of(table) != published.shards[split][number].sha256:
                    raise UserError(f"the rows of {split} shard {number} do not fit their checksum")
            span, skipped = published.span(split, number), published.skipped[split]
            unread = {row: entry for row, entry in skipped.items() if row in span}
            writer.write(split, number, table.to_pylist(), unread, {})
        (folder / LOG).unlink(missing_ok=True)
        for name in _BESIDE[1:]:
            if (snapshot / name).is_file():
                if name == DATA_RECIPE:
                    check_hub_recipe(repo_id, snapshot / name)
                write_file(folder / name, (snapshot / name).read_bytes())
        writer.finish()


def check_hub_recipe(repo_id: str, path: Path) -> None:
    """Raises UserError for a data recipe from the Hub that reads other files than those that come with it."""
    keys = read_yaml(path)
    if not isinstance(keys, dict):
        raise UserError(f"The {path.name} of {repo_id} is no data recipe. Whoever pushed it must do so again.")
    files = keys.get("data_files") or {}
    listed = files.values() if isinstance(files, dict) else [files]
    names = [name for own in listed for name in (own if isinstance(own, list) else [own])]
    leaves = [name for name in names if not isinstance(name, str) or not _is_inside(name)]
    leaves += [keys[key] for key in ("image_folder", "image_urls", "mixture", "prepare") if keys.get(key)]
    if keys.get("source") not in (".", "parquet") or leaves:
        shown = ", ".join(str(name) for name in leaves) or keys.get("source")
        raise UserError(
            f"The {path.name} of {repo_id} reads {shown!r:.200}, which is not part of the cache. A recipe from the "
            "Hub may name its own files alone: do not use it, and tell whoever pushed it."
        )


def _is_inside(name: str) -> bool:
    """Whether a relative path stays where it starts."""
    return "://" not in name and not name.startswith(("/", "~", "\\")) and ".." not in PurePosixPath(name).parts


def _places(repo_id: str, manifest: Manifest, parquet: Path) -> dict[tuple[str, int], tuple[Path, int]]:
    """The file and row group of each shard. Raises UserError if some are missing."""
    places: dict[tuple[str, int], tuple[Path, int]] = {}
    for path in sorted(parquet.glob("*.parquet")):
        if match := _PARQUET.fullmatch(path.name):
            first, last = int(match["first"]), int(match["last"])
            places |= {(match["split"], number): (path, number - first) for number in range(first, last + 1)}
    missing = [shard for shard in manifest.planned() if shard not in places]
    if missing or manifest.missing() or manifest.part is not None:
        split, number = (missing or manifest.missing() or [("train", 0)])[0]
        raise UserError(
            f"The cache {repo_id} on the Hub is not complete: {split} shard {number} is missing. Whoever pushed it "
            "must run `mmkd cache push` again."
        )
    return places


@contextmanager
def _damage_named(repo_id: str, path: Path) -> Iterator[None]:
    """Turns errors of reading a damaged Parquet file into a UserError that names it."""
    try:
        yield
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        # Deleted, so that the next call downloads it again.
        path.unlink(missing_ok=True)
        raise UserError(
            f"data/{path.name} of {repo_id} on the Hub is damaged: {error}. Run this again to download it once more; "
            "if that does not help, whoever pushed it must run `mmkd cache push` again."
        ) from error


@contextmanager
def explained(repo_id: str, note: str = "", kind: str = "data set") -> Iterator[None]:
    """Turns errors of the Hub's client into a UserError with advice; `note` follows the name of the repository."""
    try:
        yield
    except HFValidationError as error:
        raise UserError(f"{repo_id!r} is no Hub id: {error} Write user/name.") from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"The {kind} {repo_id} on the Hub has no such revision. Name a branch, tag or commit of it."
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"There is no {kind} {repo_id} on the Hub that you may read{note}. Correct the name; for "
            "a private or gated one log in with `hf auth login`."
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise UserError(
                f"The Hub refuses {repo_id} to you. Log in with `hf auth login` and a token that has the right (for a "
                "push, to write), or name a repository of your own."
            ) from error
        raise UserError(f"The Hub failed on {repo_id}: {_line(error)} Try again: what was sent is kept.") from error
    except RuntimeError as error:
        # The client raises RuntimeError for a large file whose upload failed.
        if not isinstance(error.__cause__, HfHubHTTPError | HTTPError | OSError):
            raise
        raise UserError(
            f"The Hub failed on {repo_id}: {_line(error)} {_line(error.__cause__)} Try again: what was sent is kept."
        ) from error
    except (HTTPError, OSError) as error:
        raise UserError(
            f"The Hub could not be reached for {repo_id}{note}, or its files not be kept here: {_line(error)} Check "
            "network, HF_HUB_OFFLINE and disk space, then try again: what was sent or fetched is kept."
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes() if path.is_file() else b"").hexdigest()
