"""A finished student on the Hub, in one commit, with the proof on its card."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from mmkd import __version__
from mmkd.cache.hub import explained, is_hub_id
from mmkd.errors import UserError

from .push_folder import RECIPE, Published, place_in_repository

_KEPT = (".gitattributes",)


def check_name(repo_id: str) -> None:
    """Raises UserError for a name that no repository of the Hub can have."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{repo_id!r} is no name of a repository: {error} Write ORG/NAME.") from error
    if repo_id.count("/") != 1:
        raise UserError(f"{repo_id!r} does not say whose it is: write ORG/NAME, such as my-org/student.")


def push(published: Published, public: bool = False, collection: str | None = None, cache: str | None = None) -> str:
    """Uploads what was prepared; returns its URL.

    Everything becomes visible in one commit at the end; pushed again, only what the Hub does not have is sent, and
    what an earlier push left is deleted. `collection` is a title in the owner's name.
    Student and cache are put under it.
    Raises UserError where the Hub refuses, before anything is sent where that can be known.
    """
    repo_id = published.student.repo_id
    api = HfApi(library_name="mmkd", library_version=__version__)
    with explained(repo_id, kind="model"):
        api.whoami()
        published.card.validate(repo_type="model")
        url = api.create_repo(repo_id, private=not public, exist_ok=True)
        is_private = api.repo_info(repo_id).private
        present = api.list_repo_files(repo_id)
    _check_repo(str(url), public, bool(is_private), present)
    slug = None
    if collection is not None:
        with explained(f"the collection {collection}", kind="collection"):
            owner = repo_id.partition("/")[0]
            made = api.create_collection(collection, namespace=owner, private=not public, exists_ok=True)
            slug = made.slug
    with tempfile.TemporaryDirectory() as temporary, published.model_files() as files:
        folder = Path(temporary)
        published.write_texts(folder)
        texts = sorted(path for path in folder.rglob("*") if path.is_file())
        additions = [CommitOperationAdd(place_in_repository(path), path) for path in files]
        additions += [CommitOperationAdd(place, path) for path, place in published.exported_files()]
        additions += [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in texts]
        ours = {addition.path_in_repo for addition in additions}
        stale = [CommitOperationDelete(name) for name in present if name not in ours and name not in _KEPT]
        with explained(repo_id, kind="model"):
            api.preupload_lfs_files(repo_id, additions)
            message = f"{', '.join(published.student.methods)} student, pushed by mmkd {__version__}"
            api.create_commit(repo_id, [*additions, *stale], commit_message=message)
    if slug is not None:
        _collect(api, slug, repo_id, cache)
    return str(url)


def _check_repo(url: str, public: bool, is_private: bool, present: Sequence[str]) -> None:
    if is_private == public:
        now, wanted = ("private", "public") if is_private else ("public", "private")
        raise UserError(
            f"{url} exists and is {now}. Make it {wanted} in its settings, "
            + ("leave out --public" if public else "push with --public")
            + ", or name another repository."
        )
    if RECIPE not in present and {*present} - {".gitattributes", "README.md"}:
        raise UserError(f"{url} holds something else than a student of mmkd; name another repository.")


def _collect(api: HfApi, slug: str, repo_id: str, cache: str | None) -> None:
    with explained(f"{repo_id} (it is pushed; its collection {slug} is not complete)", kind="collection"):
        api.add_collection_item(slug, repo_id, "model", exists_ok=True)
        if cache is not None:
            api.add_collection_item(slug, cache, "dataset", exists_ok=True)


def cache_of(published: Published) -> str | None:
    """The teacher's cache that the run was trained from, where it is on the Hub."""
    cache = published.keys.get("teacher_cache")
    return str(cache).partition("@")[0] if cache and not Path(str(cache)).exists() and is_hub_id(str(cache)) else None
