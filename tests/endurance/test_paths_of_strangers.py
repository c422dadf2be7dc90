"""Paths and addresses in the files of strangers: they lead into their own folder, and to public servers."""

import hashlib
import ipaddress
import json
import os
import socket
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, Features, Image, List
from PIL import Image as PILImage

from mmkd.cache.cache_card import DATA_RECIPE
from mmkd.cache.hub import check_hub_recipe
from mmkd.cache.manifest import NAME as MANIFEST
from mmkd.cache.manifest import Manifest
from mmkd.data.classification import ClassificationRecipe, load_classification
from mmkd.data.data_recipe import DataRecipe
from mmkd.data.image_urls import download, is_public
from mmkd.data.images import read_image
from mmkd.data.load_data import load_data
from mmkd.data.named_pictures import check_named_pictures
from mmkd.data.picture_source import load_pictures
from mmkd.errors import UserError
from tests.loopback import QuietHandler, listening

HUB = DataRecipe(name="theirs", source="owner/rows", columns={"prompt": "q", "completion": "a", "images": "image"})


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a user with a secret picture above the one that it is started in, and caches of its own."""
    PILImage.new("RGB", (4, 4), "red").save(tmp_path / "secret.png")
    folder = tmp_path / "work"
    (folder / "pictures" / "deep").mkdir(parents=True)
    PILImage.new("RGB", (4, 4)).save(folder / "pictures" / "deep" / "a.png")
    monkeypatch.chdir(folder)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("datasets.config.DOWNLOADED_DATASETS_PATH", tmp_path / "datasets" / "downloads")
    monkeypatch.setattr("datasets.config.EXTRACTED_DATASETS_PATH", tmp_path / "datasets" / "downloads" / "extracted")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


LEAVES = ["/etc/passwd", "../secret.png", "pictures/../../secret.png", "file:///etc/passwd", "~/x.png", "{secret}"]
LEAVES += [
    "link.png",
    "linked/secret.png",
    "zip://a.png::/etc/x.zip",
    "s3://bucket/a.png",
    "hf://datasets/me/private/a",
]
LEAVES += ["file://localhost/etc/passwd", "gzip://x::file:///etc/passwd", "//etc/passwd", "./../secret.png", "a.png"]


def named(text: str, place: Path) -> str:
    """A path, with the links that it needs."""
    os.symlink(place.parent / "secret.png", place / "pictures" / "link.png")
    os.symlink(place.parent, place / "pictures" / "linked")
    text = f"pictures/{text}" if text.startswith("link") else text
    return text.replace("{secret}", str(place.parent / "secret.png"))


FORMS = {
    "paths": lambda text: Dataset.from_dict({"image": ["data:image/png;base64,iVBORw0KGgo=", text]}),
    "lists": lambda text: Dataset.from_dict({"images": [[], [text]]}),
    "structs": lambda text: Dataset.from_list([{"image": {"bytes": None, "path": text}}]),
    "addresses": lambda text: Dataset.from_list([{"image": {"url": text}}]),
    "pictures": lambda text: Dataset.from_dict(
        {"images": [[{"bytes": None, "path": text}]]}, features=Features({"images": List(Image(decode=False))})
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", LEAVES)
@pytest.mark.parametrize("folder", [None, "pictures"])
def test_rows_of_the_hub_name_no_file_of_this_machine(text: str, form: str, folder: str | None, place: Path) -> None:
    text = named(text, place)
    rows = FORMS[form](text)
    with pytest.raises(UserError, match="may not choose files of this one"):
        check_named_pictures(replace(HUB, image_folder=folder), rows, "train")
    # What lies here is its owner's.
    local = replace(HUB, source="json", data_files={"train": ("rows.jsonl",)})
    check_named_pictures(local, rows, "train")


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_the_hub_name_their_own_files(form: str, place: Path) -> None:
    brought = place.parent / "hub" / "datasets--owner--rows" / "snapshots" / "1" / "a.png"
    blob = place.parent / "hub" / "datasets--owner--rows" / "blobs" / "2"
    for path in (brought, blob):
        path.parent.mkdir(parents=True)
    blob.write_bytes(b"")
    os.symlink(blob, brought)
    unpacked = str(place.parent / "datasets" / "downloads" / "extracted" / "hash" / "a.png")
    texts = [str(brought), unpacked, "pictures/deep/a.png", "pictures/deep/../deep/a.png"]
    texts += ["hf://datasets/owner/rows@main/a.png", "https://example.org/a.png"]
    for text in texts:
        check_named_pictures(replace(HUB, image_folder="pictures"), FORMS[form](text), "train")


def test_another_column_may_hold_any_text_that_is_no_file(place: Path) -> None:
    """A teacher's view may read one of pictures, or of words."""
    fine = Dataset.from_dict({"hint": ["/nothing/here", "../x", "the answer is in /etc"]})
    check_named_pictures(HUB, fine, "train", kept=("hint",))
    for value in ("/etc/passwd", ["/etc/passwd"], {"path": "/etc/passwd"}):
        with pytest.raises(UserError, match="/etc/passwd"):
            check_named_pictures(HUB, Dataset.from_list([{"hint": value}]), "train", kept=("hint",))


def server_of(*rows: dict[str, Any]) -> type[QuietHandler]:
    """A server of a file of rows."""
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()

    class Server(QuietHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", hashlib.sha256(content).hexdigest())
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(content)

    return Server


@pytest.mark.parametrize("kind", ["column", "messages", "pictures"])
def test_rows_behind_a_url_name_no_file_of_this_machine(
    kind: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    secret = str(place.parent / "secret.png")
    parts = [{"type": "image", "image": secret}, {"type": "text", "text": "What is it?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    rows = {
        "column": {"prompt": "What is it?", "completion": "red", "image": secret},
        "messages": {"messages": [{"role": "user", "content": parts}, answer]},
        "pictures": {"image": secret},
    }

    with listening(server_of(rows[kind])) as url:
        path = place / "data.yaml"
        path.write_text(yaml.safe_dump({"source": "json", "data_files": {"train": f"{url}/rows.jsonl"}}))
        load: Any = load_pictures if kind == "pictures" else load_data
        with pytest.raises(UserError, match=r"secret\.png, which is not in"):
            load(str(path))
        (place / "rows.jsonl").write_text(json.dumps(rows[kind]))
        path.write_text(yaml.safe_dump({"source": "json", "data_files": {"train": "rows.jsonl"}}))
        assert load(str(path))


def test_rows_of_classes_and_of_pictures_are_looked_at_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same check stands where a recipe of classes reads its rows."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)

    secret = str(place.parent / "secret.png")
    keys: dict[str, Any] = {"name": "c", "source": "json", "image": "image", "label": "label"}
    keys |= {"class_names": ("a", "b"), "splits": {"train": "train"}}
    with listening(server_of(*({"image": secret, "label": label} for label in "ab"))) as url:
        recipe = ClassificationRecipe(**keys, data_files={"train": (f"{url}/rows.jsonl",)})
        with pytest.raises(UserError, match=r"secret\.png, which is not in"):
            load_classification(recipe)


@pytest.mark.parametrize("name", ["../../secret.png", "{secret}", "deep/../../../secret.png"])
def test_a_folder_of_pictures_brings_its_own(name: str, place: Path) -> None:
    name = name.replace("{secret}", str(place.parent / "secret.png"))
    lines = [{"file_name": "deep/a.png", "text": "a"}, {"file_name": name, "text": "b"}]
    (place / "pictures" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="which is not in"):
        load_pictures("pictures")


def test_archives_are_read_and_not_unpacked(place: Path) -> None:
    """Members that would leave the folder are names of rows, and links in it are nothing."""
    with tarfile.open(place / "rows.tar", "w") as archive:
        for name in ("../../0", "/tmp/mmkd_left", "1"):
            (place / "member").write_text("hello")
            archive.add(place / "member", f"{name}.txt")
            link = tarfile.TarInfo(f"{name}.png")
            link.type, link.linkname = tarfile.SYMTYPE, str(place.parent / "secret.png")
            archive.addfile(link)
            hard = tarfile.TarInfo(f"{name}.jpg")
            hard.type, hard.linkname = tarfile.LNKTYPE, "../secret.png"
            archive.addfile(hard)
    before = {path for path in place.parent.rglob("*") if "datasets" not in path.parts}
    rows = load_data("rows.tar")["train"]
    assert rows.column_names == ["text"]
    assert rows["text"][:] == ["hello"] * 3
    assert {path for path in place.parent.rglob("*") if "datasets" not in path.parts} == before
    assert not Path("/tmp/mmkd_left.txt").exists()


def test_a_packed_file_is_unpacked_where_it_belongs(place: Path) -> None:
    line = json.dumps({"text": "hello"})

    def packed(*names: str) -> str:
        path = place / f"{len(names)}{names[0][:1]}.jsonl.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, line)
        return path.name

    with pytest.raises(UserError, match="0 files"):
        load_data(packed("../../../escaped.jsonl"))
    assert not list(place.parent.rglob("escaped*"))
    assert load_data(packed("rows.jsonl"))["train"]["text"][:] == ["hello"]
    with pytest.raises(UserError, match="2 files"):
        load_data(packed("a.jsonl", "b.jsonl"))


@pytest.mark.parametrize("split", ["../x", "/etc", "a/b", "..", "a b", ""])
def test_a_manifest_names_no_folder_but_its_own(split: str, tmp_path: Path) -> None:
    entry = {"rows": 1, "tokens": 1, "bytes": 9, "sha256": "", "file_sha256": "", "head": [1, 1]}
    forged: list[tuple[dict[str, int], dict[str, Any]]] = [({split: 4}, {}), ({"train": 4}, {split: {"0": entry}})]
    for total, shards in [*forged, ({"train": 4}, {"train": {"9": entry}})]:
        content = {"identity": {"signal": {"kind": "top_k"}}, "shard_rows": 4, "total_rows": total, "shards": shards}
        content |= {"skipped": {}, "part": None, "format": 1}
        content["checksum"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        (tmp_path / MANIFEST).write_text(json.dumps(content))
        with pytest.raises(UserError, match="is not mmkd's"):
            Manifest.read(tmp_path)


FINE = {"source": "parquet", "data_files": {"train": "kept/answers/train.parquet"}, "columns": {"prompt": "prompt"}}
OTHER = [
    {"data_files": {"train": "/home/user/rows.parquet"}},
    {"data_files": {"train": ["kept/a.parquet", "../../rows.parquet"]}},
    {"data_files": {"train": "https://example.org/rows.parquet"}},
    {"data_files": "~/rows.parquet"},
    {"data_files": {"train": {"a": "b"}}},
    {"source": "json"},
    {"source": "/home/user/rows"},
    {"source": "owner/other"},
    {"image_folder": "/"},
    {"image_urls": True},
    {"mixture": [{"data": "/home/user/rows.yaml", "weight": 1}]},
]


@pytest.mark.parametrize("keys", OTHER)
def test_a_data_recipe_of_the_hub_reads_its_own_files(keys: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / DATA_RECIPE
    for fine in (FINE, {"source": ".", "splits": {"train": "train"}}):
        path.write_text(yaml.safe_dump(fine))
        check_hub_recipe("user/answers", path)
    path.write_text(yaml.safe_dump({**FINE, **keys}))
    with pytest.raises(UserError, match="may name its own files alone"):
        check_hub_recipe("user/answers", path)


INSIDE = ("::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2002:a00:1::1", "fe80::1")


@pytest.mark.parametrize("address", INSIDE)
def test_addresses_that_stand_for_private_ones_are_private(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    assert is_public(ipaddress.ip_address("2606:2800:220:1::1"))
    assert is_public(ipaddress.ip_address("64:ff9b::808:808"))


def test_a_name_with_one_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of its addresses the connection would take."""
    places = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (own, 80)) for own in ("93.184.216.34", "192.168.0.1")]
    monkeypatch.setattr("mmkd.data.image_urls.socket.getaddrinfo", lambda *args, **kwargs: places)
    with pytest.raises(UserError, match=r"192\.168\.0\.1, an address of a private network"):
        download("http://two.example/a.png")


def test_pictures_are_not_downloaded_unasked(place: Path) -> None:
    asked = []

    class Server(QuietHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    with listening(Server) as url:
        (place / "rows.jsonl").write_text(json.dumps({"image": f"{url}/a.png"}))
        pictures = load_pictures("rows.jsonl").train
        with pytest.raises(UserError, match="image_urls: true"):
            pictures[0]
        with pytest.raises(UserError, match="image_urls: true"):
            read_image(f"{url}/a.png")
    assert not asked
