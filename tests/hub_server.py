"""A Hugging Face Hub in this process, for the real `huggingface_hub` client: repositories, commits, LFS, revisions.

The client reads HF_ENDPOINT when it is imported, so it runs in a process of its own, with `LoopbackHub.environment`.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.loopback import QuietHandler, listening

LFS_SUFFIXES = (".safetensors", ".parquet", ".npy", ".bin", ".arrow", ".png")
LFS_BYTES = 10_000_000
DATE = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Blob:
    """A file's content, kept by git or by LFS."""

    content: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid

    def entry(self, path: str) -> dict[str, Any]:
        """How the API lists it."""
        lfs = {"oid": self.sha256, "size": len(self.content), "pointerSize": 130}
        return {
            "type": "file",
            "path": path,
            "oid": self.git_oid,
            "size": len(self.content),
            **({"lfs": lfs} if self.lfs else {}),
        }


@dataclass
class Repo:
    """One repository; `kind` is model, dataset or space."""

    kind: str
    id: str
    private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    """Commit -> path -> file."""
    refs: dict[str, str] = field(default_factory=dict)
    """Branch or tag -> commit."""

    def __post_init__(self) -> None:
        self.commit({".gitattributes": b"*.parquet filter=lfs diff=lfs merge=lfs -text\n"})

    @property
    def files(self) -> dict[str, bytes]:
        """What main holds, without the .gitattributes that every repository starts with."""
        found = self.commits[self.refs["main"]]
        return {path: blob.content for path, blob in found.items() if path != ".gitattributes"}

    def commit(self, changes: Mapping[str, bytes | Blob | None], branch: str = "main") -> str:
        """A new commit with some files changed, or deleted where there is None."""
        files = dict(self.commits.get(self.refs.get(branch, ""), {}))
        for path, content in changes.items():
            files.pop(path, None)
            if content is not None:
                files[path] = content if isinstance(content, Blob) else Blob(content, is_lfs(path, len(content)))
        sha = hashlib.sha1(f"{self.kind} {self.id} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha], self.refs[branch] = files, sha
        return sha

    def find(self, revision: str) -> str:
        """The commit of a branch, a tag or itself."""
        sha = self.refs.get(revision.removeprefix("refs/heads/"), revision)
        if sha not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha


class Refusal(Exception):
    """An error answer."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass
class Request:
    """What was asked, and by whom."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Any
    body: bytes
    user: str | None

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Answer:
    """Sent as JSON, unless it is bytes."""

    content: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class LoopbackHub:
    """What is stored, who may enter, and in `requests` what was asked ("PUT /lfs/...")."""

    url: str = ""
    tokens: dict[str, str] = field(default_factory=lambda: {"x": "user"})
    """Token -> user name."""
    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    """Uploaded LFS files by sha256, of any repository and not yet of a commit perhaps."""
    collections: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By slug, as the API tells them."""
    requests: list[str] = field(default_factory=list)
    failing: str | None = None
    """A regular expression; requests that it is found in are answered with `failing_with`."""
    failing_with: int = 500
    """The client tries again, and waits, at 500."""
    lock: Any = field(default_factory=threading.Lock)

    def dataset(self, repo_id: str) -> Repo:
        return self.repos["dataset", repo_id]

    def create(self, kind: str, repo_id: str, files: Mapping[str, bytes] | None = None, private: bool = False) -> Repo:
        """A repository made behind the client's back."""
        repo = self.repos[kind, repo_id] = Repo(kind, repo_id, private)
        if files is not None:
            repo.commit(files)
        return repo

    def environment(self, home: Path, token: str | None = "x") -> dict[str, str]:
        """What a process needs in its environment for this to be its Hub, with all it keeps under `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": token or "",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "NO_PROXY": "127.0.0.1",
        }

    def forget(self) -> None:
        """Makes it the Hub that it was when it began."""
        for known in (self.repos, self.blobs, self.collections, self.requests):
            known.clear()
        self.failing, self.failing_with = None, 500

    def answer(self, request: Request) -> Answer:
        with self.lock:
            self.requests.append(f"{request.method} {request.path}")
            if self.failing is not None and re.search(self.failing, self.requests[-1]):
                raise Refusal(self.failing_with, "InternalError", "told to fail")
            for method, pattern, handler in ROUTES:
                match = pattern.fullmatch(request.path)
                if match and method == request.method.replace("HEAD", "GET"):
                    return handler(
                        self, request, **{name: unquote(text) for name, text in match.groupdict("").items()}
                    )
        raise Refusal(404, "NotFound", f"nothing at {request.method} {request.path}")

    def repo(self, request: Request, kind: str, id: str, write: bool = False) -> Repo:
        found = self.repos.get((kind or "model", id))
        if found is None or (found.private and request.user != id.split("/")[0]):
            raise Refusal(404 if request.user else 401, "RepoNotFound", "Repository not found")
        if write:
            self.check_writer(request, id.split("/")[0])
        return found

    def check_writer(self, request: Request, namespace: str | None) -> None:
        if request.user is None:
            raise Refusal(401, "", "Invalid username or password.")
        if request.user != namespace:
            raise Refusal(403, "", f"You don't have the rights to write under the namespace {namespace}")

    def whoami(self, request: Request) -> Answer:
        if request.user is None:
            raise Refusal(401, "", "Invalid username or password.")
        return Answer({"type": "user", "name": request.user, "fullname": request.user, "orgs": []})

    def create_repo(self, request: Request) -> Answer:
        asked = request.json
        namespace, kind = asked.get("organization") or request.user, asked.get("type") or "model"
        self.check_writer(request, namespace)
        repo_id = f"{namespace}/{asked['name']}"
        answer = {"name": repo_id, "url": f"{self.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"}
        if (kind, repo_id) in self.repos:
            return Answer({"error": "You already created this repo", **answer}, 409)
        self.create(kind, repo_id, private=asked.get("visibility") == "private" or asked.get("private") is True)
        return Answer(answer)

    def validate_yaml(self, request: Request) -> Answer:
        header = re.match(r"---\n(.*?)\n---\n", request.json["content"], re.DOTALL)
        if header is None:
            return Answer({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        try:
            wrong = "" if isinstance(yaml.safe_load(header[1]), dict) else "metadata must be a mapping"
        except yaml.YAMLError as error:
            wrong = str(error)
        return Answer({"errors": [{"message": wrong}] if wrong else [], "warnings": []}, 400 if wrong else 200)

    def info(self, request: Request, kind: str, id: str, revision: str) -> Answer:
        repo = self.repo(request, kind, id)
        sha = repo.find(revision or "main")
        facts = {"_id": id, "id": id, "author": id.split("/")[0], "sha": sha, "private": repo.private, "gated": False}
        card = repo.commits[sha].get("README.md", Blob(b"")).content.decode()
        header = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
        facts |= {"cardData": yaml.safe_load(header[1])} if header else {}
        facts |= {"disabled": False, "downloads": 0, "likes": 0, "tags": [], "createdAt": DATE, "lastModified": DATE}
        return Answer({**facts, "siblings": [{"rfilename": path} for path in sorted(repo.commits[sha])]})

    def refs(self, request: Request, kind: str, id: str) -> Answer:
        refs = self.repo(request, kind, id).refs
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in refs.items()]
        return Answer({"branches": branches, "tags": [], "converts": [], "pullRequests": []})

    def tree(self, request: Request, kind: str, id: str, revision: str, path: str) -> Answer:
        repo = self.repo(request, kind, id)
        entries = listed(repo.commits[repo.find(revision)], path)
        if path and not entries:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist on {revision}")
        if request.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            depth = path.count("/") + 1 if path else 0
            entries = [entry for entry in entries if entry["path"].count("/") == depth]
        return Answer(entries)

    def paths_info(self, request: Request, kind: str, id: str, revision: str) -> Answer:
        repo = self.repo(request, kind, id)
        asked = request.json if request.body[:1] == b"{" else parse_qs(request.body.decode())
        entries = listed(repo.commits[repo.find(revision)], "")
        return Answer([entry for entry in entries if entry["path"] in asked.get("paths", [])])

    def preupload(self, request: Request, kind: str, id: str, revision: str) -> Answer:
        repo = self.repo(request, kind, id, write=True)
        present, files = repo.commits[repo.find(revision)], []
        for file in request.json["files"]:
            lfs, old = is_lfs(file["path"], file["size"]), present.get(file["path"])
            mode = {"uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            files.append({"path": file["path"], "oid": old.etag if old else None, **mode})
        return Answer({"files": files})

    def lfs_batch(self, request: Request, kind: str, id: str) -> Answer:
        self.repo(request, kind, id, write=True)
        objects = []
        for wanted in request.json["objects"]:
            upload = {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}
            objects.append({**wanted, **({} if wanted["oid"] in self.blobs else {"actions": upload})})
        return Answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, request: Request, oid: str) -> Answer:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Refusal(400, "", "the content does not have this sha256")
        self.blobs[oid] = request.body
        return Answer({})

    def commit(self, request: Request, kind: str, id: str, revision: str) -> Answer:
        repo = self.repo(request, kind, id, write=True)
        files, changes = repo.commits[repo.find(revision)], {}
        for line in request.body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header" and value.get("parentCommit", repo.find(revision)) != repo.find(revision):
                raise Refusal(412, "", "A commit has happened since.")
            if key == "file":
                changes[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self.blobs:
                    raise Refusal(400, "", f"LFS pointer {value['path']} points to a file that does not exist")
                changes[value["path"]] = Blob(self.blobs[value["oid"]], lfs=True)
            elif key in ("deletedFile", "deletedFolder"):
                folder = value["path"].rstrip("/") + "/"
                gone = [path for path in files if path == value["path"] or path.startswith(folder)]
                if not gone:
                    raise Refusal(404, "EntryNotFound", f"A file with this name doesn't exist: {value['path']}")
                changes |= dict.fromkeys(gone)
        sha = repo.commit(changes, revision)
        return Answer({"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{id}/commit/{sha}"})

    def create_collection(self, request: Request) -> Answer:
        asked = request.json
        self.check_writer(request, asked["namespace"])
        slug = f"{asked['namespace']}/{re.sub('[^a-z0-9]+', '-', asked['title'].lower())}-0123456789ab"
        if slug in self.collections:
            return Answer({"error": "This collection exists", "slug": slug}, 409)
        facts = {"slug": slug, "title": asked["title"], "owner": {"name": asked["namespace"]}, "items": []}
        facts |= {"lastUpdated": DATE, "position": 0, "private": asked["private"], "theme": "green", "upvotes": 0}
        self.collections[slug] = facts
        return Answer(facts)

    def collection(self, request: Request, slug: str) -> Answer:
        if slug not in self.collections:
            raise Refusal(404, "", "Collection not found")
        return Answer(self.collections[slug])

    def add_to_collection(self, request: Request, slug: str) -> Answer:
        self.check_writer(request, slug.split("/")[0])
        items, item = self.collections[slug]["items"], request.json["item"]
        if (item["type"], item["id"]) not in self.repos:
            raise Refusal(404, "RepoNotFound", f"There is no {item['type']} {item['id']}")
        if any(one["id"] == item["id"] for one in items):
            raise Refusal(409, "", "It is in this collection")
        items.append({**item, "_id": str(len(items)), "position": len(items)})
        return Answer(self.collections[slug])

    def resolve(self, request: Request, kind: str, id: str, revision: str, path: str) -> Answer:
        repo = self.repo(request, kind, id)
        sha = repo.find(revision)
        blob = repo.commits[sha].get(path)
        if blob is None:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist on {revision}")
        linked = {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content))} if blob.lfs else {}
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes", **linked}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
        if span is None:
            return Answer(blob.content, 200, headers)
        size = len(blob.content)
        start, stop = int(span[1]), min(size, int(span[2]) + 1 if span[2] else size)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return Answer(blob.content[start:stop], 206, headers)


def is_lfs(path: str, size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) or size > LFS_BYTES


def listed(files: Mapping[str, Blob], folder: str) -> list[dict[str, Any]]:
    """Files and folders below a folder, or the one file of that name."""
    inside = {path: blob for path, blob in files.items() if not folder or path.startswith(f"{folder}/")}
    parents = {str(parent) for path in inside for parent in Path(path).parents} - {".", folder}
    above = {str(parent) for parent in Path(folder).parents}
    folders = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(parents - above)]
    return folders + [blob.entry(path) for path, blob in sorted(inside.items())]


_API = r"/api/(?P<kind>model|dataset|space)s/(?P<id>[^/]+/[^/]+)"
_REPO = r"/(?:(?P<kind>dataset|space)s/)?(?P<id>[^/]+/[^/]+)"
_REVISION = r"/(?P<revision>[^/]+)"

ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Answer]]] = [
    (method, re.compile(pattern), handler)
    for method, pattern, handler in (
        ("GET", r"/api/whoami-v2", LoopbackHub.whoami),
        ("POST", r"/api/repos/create", LoopbackHub.create_repo),
        ("POST", r"/api/validate-yaml", LoopbackHub.validate_yaml),
        ("POST", r"/api/collections", LoopbackHub.create_collection),
        ("GET", r"/api/collections/(?P<slug>[^/]+/[^/]+)", LoopbackHub.collection),
        ("POST", r"/api/collections/(?P<slug>[^/]+/[^/]+)/items", LoopbackHub.add_to_collection),
        ("GET", rf"{_API}(?:/revision{_REVISION})?", LoopbackHub.info),
        ("GET", rf"{_API}/refs", LoopbackHub.refs),
        ("GET", rf"{_API}/tree{_REVISION}(?:/(?P<path>.*))?", LoopbackHub.tree),
        ("POST", rf"{_API}/paths-info{_REVISION}", LoopbackHub.paths_info),
        ("POST", rf"{_API}/preupload{_REVISION}", LoopbackHub.preupload),
        ("POST", rf"{_API}/commit{_REVISION}", LoopbackHub.commit),
        ("POST", rf"{_REPO}\.git/info/lfs/objects/batch", LoopbackHub.lfs_batch),
        ("PUT", r"/lfs/(?P<oid>\w+)", LoopbackHub.lfs_put),
        ("GET", rf"{_REPO}/resolve{_REVISION}/(?P<path>.+)", LoopbackHub.resolve),
    )
]


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    """A Hub on a free port of the loopback interface; everything is forgotten in the end."""
    hub = LoopbackHub()

    class Handler(QuietHandler):
        def handle_request(self) -> None:
            url = urlsplit(self.path)
            token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
            request = Request(
                self.command, url.path, parse_qs(url.query), self.headers, self.body(), hub.tokens.get(token)
            )
            try:
                answer = hub.answer(request)
            except Refusal as refusal:
                headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
                answer = Answer({"error": refusal.message}, refusal.status, headers)
            content = answer.content if isinstance(answer.content, bytes) else json.dumps(answer.content).encode()
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = handle_request

        def body(self) -> bytes:
            if self.headers["Transfer-Encoding"] != "chunked":
                return self.rfile.read(int(self.headers["Content-Length"] or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

    with listening(Handler) as hub.url:
        yield hub
