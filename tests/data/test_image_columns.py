"""The column `images` from whatever a data set has: lists of pictures as they are stored, of which none is decoded."""

import base64
import io
import json
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from PIL import Image as PILImage

from mmkd.data.image_columns import UNDECODED, download_images, image_column, image_lists, stored_image
from mmkd.data.image_urls import download
from mmkd.data.images import UnreadableImage, UnusableRow, read_image, read_row
from mmkd.data.load_data import load_data
from mmkd.errors import UserError
from tests.loopback import QuietHandler, listening


def png(shade: int) -> bytes:
    file = io.BytesIO()
    PILImage.new("RGB", (4, 3), (shade, shade, 200)).save(file, "PNG")
    return file.getvalue()


FILES = [png(10), png(20), png(30)]
TEXTS = [base64.b64encode(one).decode() for one in FILES]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
STRUCTS = [{"bytes": one, "path": None} for one in FILES]

# One column each of three rows, of which the second has no picture.
SINGLE = {
    "base64": pa.array([TEXTS[0], None, TEXTS[2]]),
    "base64, nothing as an empty text": pa.array([TEXTS[0], "", TEXTS[2]]),
    "large strings": pa.array([TEXTS[0], None, TEXTS[2]], pa.large_string()),
    "data URLs": pa.array([f"data:image/png;base64,{TEXTS[0]}", None, f"data:image/png;base64,{TEXTS[2]}"]),
    "bytes": pa.array([FILES[0], None, FILES[2]]),
    "large bytes": pa.array([FILES[0], None, FILES[2]], pa.large_binary()),
    "structs": pa.array([STRUCTS[0], None, STRUCTS[2]], STRUCT),
    "structs of large values in another order": pa.array(
        [{"path": None, "bytes": FILES[0]}, None, {"path": "x.png", "bytes": FILES[2]}],
        pa.struct([("path", pa.large_string()), ("bytes", pa.large_binary())]),
    ),
    "structs of bytes": pa.array([{"bytes": FILES[0]}, None, {"bytes": FILES[2]}]),
    "structs of base64": pa.array([{"bytes": TEXTS[0]}, None, {"bytes": TEXTS[2]}]),
    "structs of URLs": pa.array([{"url": TEXTS[0]}, None, {"url": TEXTS[2]}]),
}


def listed(values: pa.Array) -> dict[str, pa.Array]:
    """The pictures as lists of one, in the kinds of lists that pandas, polars and datasets write."""
    rows = [[value] if value else value and [] for value in values.to_pylist()]
    inner = values.type
    return {
        "list": pa.array(rows, pa.list_(inner)),
        "large_list": pa.array(rows, pa.large_list(inner)),
        "slice": pa.array([[None], *rows, [None]], pa.list_(inner)).slice(1, 3),
    }


def shades(rows: Any) -> list[list[int]]:
    found = []
    for row in rows:
        read = read_row(row)
        assert not isinstance(read, UnusableRow), read.reason
        found.append([image.getpixel((0, 0))[0] for image in read["images"]])
    return found


@pytest.mark.parametrize("form", SINGLE)
def test_every_form_becomes_lists_of_undecoded_pictures(form: str) -> None:
    values = SINGLE[form]
    for name, column in {"single": values, **listed(values)}.items():
        for key in ("image", "images"):
            rows = image_column(Dataset(pa.table({"n": [1, 2, 3], key: column})))
            assert rows.column_names == ["n", "images"], name
            assert rows.features["images"] == UNDECODED
            assert shades(rows) == [[10], [], [30]], name
            assert shades(rows.select([2, 0])) == [[30], [10]]


def test_a_column_that_datasets_decodes_is_decoded_no_more(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(FILES[0])
    values: dict[Any, Any] = {"path": str(path), "bytes": None}
    for feature, images in ((Image(), values), (List(Image()), [values]), (Image(decode=False), values)):
        for key in ("image", "images"):
            rows = Dataset.from_list(
                [{key: images, "text": "x"}] * 2, features=Features({key: feature, "text": Value("string")})
            )
            found = image_column(rows.shuffle(seed=0))
            assert found[0] == {"images": [values], "text": "x"}
            assert shades(found) == [[10], [10]]
            assert image_column(found) is found


def test_pictures_of_a_list_of_rows() -> None:
    image = PILImage.new("RGB", (4, 3), (10, 0, 0))
    assert shades(image_column(Dataset.from_list([{"images": [image]}, {"images": []}]))) == [[10], []]
    assert shades(image_column(Dataset.from_list([{"image": image}, {"image": None}]))) == [[10], []]
    # A list with nothing in it is a row whose picture is missing, and not one without pictures.
    missing = read_row(image_column(Dataset.from_dict({"images": [STRUCTS[:1], [None]]}))[1])
    assert isinstance(missing, UnusableRow)
    assert missing.reason.startswith("images[0]: nothing (None)")


def test_streams_are_read_alike() -> None:
    rows = Dataset.from_list([{"image": one} for one in STRUCTS], features=Features({"image": Image()}))
    assert shades(image_column(rows.to_iterable_dataset())) == [[10], [20], [30]]
    many = rows.map(
        lambda row: {"images": [row["image"]]}, remove_columns="image", features=Features({"images": List(Image())})
    )
    assert shades(image_column(many.to_iterable_dataset())) == [[10], [20], [30]]
    plain = IterableDataset.from_generator(lambda: iter([{"image": TEXTS[0]}, {"image": None}]))
    assert shades(image_column(plain)) == [[10], []]
    assert image_column(None) is None


def test_the_fingerprint_says_what_the_rows_are() -> None:
    """Caches of `map` are found by it."""
    tables = [pa.table({"image": SINGLE["bytes"]}), pa.table({"image": SINGLE["bytes"].slice(1)})]
    names = [image_column(Dataset(table))._fingerprint for table in (tables[0], tables[0], tables[1])]
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize(
    "values, said",
    [
        ([1, 2], "int64"),
        ([[[0, 1], [2, 3]]], "PIL.Image.fromarray"),
        ([{"src": "a.png"}], "must hold images"),
        ([1.5], "double"),
    ],
)
def test_columns_of_something_else_are_refused(values: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        image_column(Dataset.from_dict({"images": values}))
    with pytest.raises(UserError, match="both a column image and a column images"):
        image_column(Dataset.from_dict({"image": TEXTS, "images": [TEXTS] * 3}))


def test_a_picture_as_it_is_stored() -> None:
    image = read_image(FILES[0])
    for value in (FILES[0], TEXTS[0], STRUCTS[0], image, {"url": TEXTS[0]}, {"bytes": bytearray(FILES[0])}):
        stored = stored_image(value)
        assert set(stored) == {"bytes", "path"}
        assert read_image(stored).tobytes() == image.tobytes()
    with pytest.raises(UnreadableImage):
        stored_image(3)


def test_relative_paths_start_at_the_folder() -> None:
    column = pa.chunked_array([pa.array([["a.png", "/b.png"], None, [f"data:image/png;base64,{TEXTS[0]}"]])])
    found = image_lists(column, "photos", embed=True).to_pylist()
    assert found == [
        [{"bytes": None, "path": "photos/a.png"}, {"bytes": None, "path": "/b.png"}],
        [],
        [{"bytes": FILES[0], "path": None}],
    ]


@pytest.mark.parametrize("form", ["base64", "data URLs", "bytes", "structs", "structs of base64", "large bytes"])
def test_recipes_read_every_form(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with bytes that any program decodes, whatever the file had."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    table = pa.table({"q": ["a", "b", "c"], "picture": SINGLE[form]})
    pq.write_table(table, "rows.parquet")
    keys = {"source": "parquet", "data_files": {"train": "rows.parquet"}, "shuffle_seed": None}
    keys["columns"] = {"prompt": "q", "completion": "q", "images": "picture"}
    Path("data.yaml").write_text(yaml.safe_dump(keys))
    rows: Any = load_data("./data.yaml")["train"]
    assert rows.features["images"] == List(Image())
    assert [[image.getpixel((0, 0))[0] for image in row["images"]] for row in rows] == [[10], [], [30]]


def test_json_lines_may_mix_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    Path("a.png").write_bytes(FILES[1])
    pictures = [TEXTS[0], ["a.png", TEXTS[2]], None, {"path": "a.png"}]
    lines = [{"q": "what", "picture": one} for one in pictures]
    Path("rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    keys = {"source": "json", "data_files": {"train": "rows.jsonl"}, "shuffle_seed": None}
    keys["columns"] = {"prompt": "q", "completion": "q", "images": "picture"}
    Path("data.yaml").write_text(yaml.safe_dump(keys))
    assert shades(image_column(load_data("./data.yaml")["train"])) == [[10], [20, 30], [], [20]]


def test_urls_are_downloaded_once_where_the_recipe_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    asked = []

    def download(url: str) -> bytes:
        asked.append(url)
        if "gone" in url:
            raise UserError("404")
        return FILES[0]

    monkeypatch.setattr("mmkd.data.image_columns.download", download)
    lines = [{"q": "what", "picture": f"http://127.0.0.1/{name}.png"} for name in ("a", "a", "gone")]
    Path("rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    keys = {"source": "json", "data_files": {"train": "rows.jsonl"}, "shuffle_seed": None, "image_urls": True}
    keys["columns"] = {"prompt": "q", "completion": "q", "images": "picture"}
    Path("data.yaml").write_text(yaml.safe_dump(keys))
    rows = image_column(load_data("./data.yaml")["train"])
    assert shades(rows.select([0, 1])) == [[10], [10]]
    assert isinstance(read_row(rows[2]), UnusableRow)
    assert sorted(asked) == ["http://127.0.0.1/a.png", "http://127.0.0.1/gone.png"]


def test_servers_of_pictures_are_read_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("mmkd.data.image_urls.is_public", lambda address: True)
    monkeypatch.setattr("mmkd.data.image_urls.LARGEST", 10_000)
    monkeypatch.setattr("mmkd.data.image_urls.TIMEOUT", 2.0)
    monkeypatch.setattr("mmkd.data.image_urls.LONGEST", 3.0)
    asked, ended = [], threading.Event()

    class Server(QuietHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response({"/gone": 404, "/moved": 302}.get(self.path, 200))
            if self.path == "/moved":
                self.send_header("Location", "/picture")
            content = {"/picture": FILES[0], "/large": bytes(20_000)}.get(self.path, b"")
            endless = self.path in ("/silent", "/trickle")
            self.send_header("Content-Length", str(100_000 if endless else len(content)))
            self.end_headers()
            self.wfile.write(content)
            while endless and not ended.wait(0.05):
                if self.path == "/trickle":
                    self.wfile.write(b"x")

    before = set(threading.enumerate())
    with listening(Server) as url:
        names = ["picture", "moved", "gone", "large", "silent", "trickle", "picture"]
        data = Dataset.from_dict({"image": [f"{url}/{name}" for name in names]})
        rows = image_column(download_images(data))
        # Who asked has gone, and no thread of ours waits for a server.
        assert not [one for one in set(threading.enumerate()) - before if "ThreadPoolExecutor" in one.name]
        ended.set()
        assert asked.count("/picture") == 2
        assert asked.count("/silent") == asked.count("/trickle") == 1
        assert shades(rows.select([0, 1, 6])) == [[10], [10], [10]]
        for row, reason in enumerate(
            ["404 Not Found", "more than 10,000 bytes", "ReadTimeout", "longer than 3 sec"], 2
        ):
            assert isinstance(read_row(rows[row]), UnusableRow)
            assert f"URL {url}/{names[row]} " in caplog.text
            assert reason in caplog.text
        download_images(data.select([0]))
        assert asked.count("/picture") == 2


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "127.1",
        "2130706433",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "10.1.2.3",
        "169.254.169.254",
        "0",
    ],
)
def test_pictures_are_never_asked_of_private_addresses(host: str) -> None:
    with pytest.raises(UserError, match="an address of a private network"):
        download(f"http://{host}:9/picture.png")


def test_a_redirect_to_a_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Server(QuietHandler):
        def do_GET(self) -> None:
            asked.append(self.headers["Host"])
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.2:{port}/secret")
            self.send_header("Content-Length", "0")
            self.end_headers()

    monkeypatch.setattr("mmkd.data.image_urls.is_public", lambda address: str(address) == "127.0.0.1")
    with listening(Server) as url:
        port = url.rpartition(":")[2]
        with pytest.raises(UserError, match=r"127\.0\.0\.2, an address of a private network"):
            download(f"http://127.0.0.1:{port}/picture.png")
    assert asked == [f"127.0.0.1:{port}"]


def test_a_name_is_asked_at_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Server(QuietHandler):
        def do_GET(self) -> None:
            content = self.headers["Host"].encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    resolved = []

    def rebound(host: str, port: int, *args: Any, **kwargs: Any) -> list[Any]:
        resolved.append(host)
        return [(2, 1, 6, "", ("127.0.0.1", port))]

    with listening(Server) as url:
        port = url.rpartition(":")[2]
        monkeypatch.setattr("mmkd.data.image_urls.is_public", lambda address: True)
        monkeypatch.setattr("mmkd.data.image_urls.socket.getaddrinfo", rebound)
        assert download(f"http://pictures.example:{port}/a") == f"pictures.example:{port}".encode()
    assert resolved.count("pictures.example") == 1
