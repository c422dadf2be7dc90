"""Rows that are named directly: files, folders, globs and Hub ids, their layouts, splits and what is refused."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, DatasetDict
from transformers import ViTConfig

from mmkd.commands.main import main
from mmkd.data.classification import ClassificationRecipe, load_classification
from mmkd.data.data_recipe import DataRecipe
from mmkd.data.load_data import load_data
from mmkd.data.recipe_writing import write_data_recipe
from mmkd.data.source_description import describe
from mmkd.errors import UserError
from mmkd.publish.push_folder import is_recipe_file
from tests.classes import pixels
from tests.data.sources import CONTAINERS, LAYOUTS, NESTED, png, rows_of, write_jsonl, write_png, write_shard
from tests.helpers import VISION
from tests.hub_server import loopback_hub


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf_cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def all_rows(data: DatasetDict) -> list[str]:
    """The rows of all splits in any order: files of several kinds need not have the same one."""
    return sorted(json.dumps(row, default=str) for split in data.values() for row in split)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_every_layout_is_recognised_in_every_kind_of_file(kind: str, container: str) -> None:
    if container == "csv" and kind in NESTED:
        pytest.skip("a CSV file holds no lists")
    source = CONTAINERS[container](rows_of(kind))
    found = describe(source)
    assert found.kind == kind
    assert sum(found.rows.values()) == 24
    assert found.recipe is not None
    assert not found.has_images
    data = load_data(source)
    assert {split: len(rows) for split, rows in data.items()} == {"train": 23, "eval": 1}
    assert all_rows(data) == all_rows(load_data(write_jsonl("same.jsonl", rows_of(kind))))


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("folder", [".", "recipes"])
def test_a_written_recipe_gives_the_same_rows(kind: str, folder: str) -> None:
    source = CONTAINERS["folder"](rows_of(kind))
    found = describe(source)
    write_data_recipe(found, Path(folder, "data.yaml"))
    path = f"./{folder}/data.yaml"
    if kind == "classes":
        direct, written = (load_classification(ClassificationRecipe.load(name)) for name in (source, path))
        assert written.class_names == direct.class_names == ("bad", "good")
        assert written.train[:] == direct.train[:]
        assert direct.validation is not None
        assert written.validation is not None
        assert written.validation[:] == direct.validation[:]
        return
    direct, written = load_data(source), load_data(path)
    assert {split: rows[:] for split, rows in direct.items()} == {split: rows[:] for split, rows in written.items()}
    if folder == ".":
        assert DataRecipe.load(path).fingerprint == DataRecipe.load(source).fingerprint
    with pytest.raises(UserError, match="exists already"):
        write_data_recipe(found, Path(folder, "data.yaml"))


def test_compressed_files() -> None:
    write_jsonl("rows.jsonl", rows_of("chat"))
    Path("rows.jsonl.gz").write_bytes(gzip.compress(Path("rows.jsonl").read_bytes()))
    assert all_rows(load_data("rows.jsonl.gz")) == all_rows(load_data("rows.jsonl"))


def test_lines_of_text() -> None:
    Path("lines.txt").write_text("one\n\ntwo\n")
    assert describe("lines.txt").kind == "text"
    assert sorted(load_data("lines.txt")["train"]["text"]) == ["one", "two"]


# Pictures


def test_class_folders() -> None:
    for i in range(10):
        write_png(f"pets/golden_retriever/{i}.png")
        write_png(f"pets/cat/{i}.png", "blue")
    write_png("pets/stray.png")
    found = describe("pets")
    assert (found.kind, found.recipe) == ("class_folders", None)
    assert found.class_names == ("cat", "golden retriever")
    assert any("1 picture left out" in note for note in found.notes)
    data = load_classification(ClassificationRecipe.load("pets"))
    assert data.validation is not None
    assert (len(data.train), len(data.validation)) == (18, 2)
    with pytest.raises(UserError, match="Pictures with a class are for method dho"):
        load_data("pets")
    write_data_recipe(found, Path("data.yaml"))
    written = load_classification(ClassificationRecipe.load("./data.yaml"))
    assert written.class_names == data.class_names
    assert written.train[:] == data.train[:]


def test_class_folders_by_split() -> None:
    for split in ("train", "val", "test"):
        for name in ("cat", "dog"):
            write_png(f"pets/{split}/{name}/0.png")
    write_png("pets/unlabeled/0.png")
    recipe = ClassificationRecipe.load("pets")
    assert recipe.splits == {name: name for name in ("train", "validation", "test", "unlabeled")}
    data = load_classification(recipe)
    assert data.unlabeled is not None
    assert (len(data.train), len(data.unlabeled)) == (2, 1)


def test_a_table_of_pictures_with_classes_in_another_folder() -> None:
    for i in range(6):
        write_png(f"far/{i}.png")
    write_jsonl("far/rows.jsonl", [{"image": f"{i}.png", "label": i % 2} for i in range(6)])
    Path("far/classes.txt").write_text("cat\ndog\n")
    data = load_classification(ClassificationRecipe.load("far/rows.jsonl"))
    assert data.class_names == ("cat", "dog")
    assert Path(data.train[0]["image"]["path"]).is_file()
    Path("far/classes.txt").unlink()
    write_jsonl("far/rows.jsonl", [{"image": f"{i}.png", "label": 3 * i} for i in range(6)])
    with pytest.raises(UserError, match=r"the numbers 0, 3, 6, 9, 12, .*class_names"):
        ClassificationRecipe.load("far/rows.jsonl")


def test_pictures_with_metadata_are_captions() -> None:
    for i in range(4):
        write_png(f"shown/{i}.png")
    write_jsonl("shown/metadata.jsonl", [{"file_name": f"{i}.png", "text": f"picture {i}"} for i in range(3)])
    found = describe("shown")
    assert (found.kind, found.has_images) == ("captions", True)
    assert any("1 picture left out, not in metadata.jsonl" in note for note in found.notes)
    rows = load_data("shown")["train"].select_columns(["prompt", "completion"])[:]
    assert rows["prompt"][0][0]["content"] == [{"type": "image", "text": None}]
    assert sorted(answer[0]["content"][0]["text"] for answer in rows["completion"]) == [
        f"picture {i}" for i in range(3)
    ]
    write_jsonl("shown/metadata.jsonl", [{"file_name": "gone.png", "text": "x"}])
    with pytest.raises(UserError, match=r"names the picture shown/gone.png, which is not there"):
        load_data("shown")


def test_llava_beside_its_pictures() -> None:
    talk = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": "red"}]
    write_jsonl("vqa/rows.jsonl", [{"image": f"{i}.png", "conversations": talk} for i in range(4)])
    for i in range(4):
        write_png(f"vqa/images/{i}.png")
    for source in ("vqa", "vqa/rows.jsonl", "vqa/*.jsonl"):
        found = describe(source)
        assert (found.kind, found.has_images) == ("llava", True)
        assert "Pictures are looked up in vqa/images." in found.notes
        row = load_data(source)["train"].with_format(None)[0]
        assert row["images"][0].size == (8, 8)


SHARDS: dict[str, tuple[dict[str, bytes], str, tuple[str, ...]]] = {
    "json": ({"png": png(), "json": b'{"question": "Colour?", "answer": "red"}'}, "prompt_completion", ("image",)),
    "text": ({"jpg": png(), "txt": b"a red square"}, "captions", ("caption", "image")),
    "class": ({"png": png(), "cls": b"0"}, "classes", ("image", "label")),
    "several": (
        {"a.png": png(), "b.png": png(), "json": b'{"question": "Q", "answer": "A"}'},
        "prompt_completion",
        (),
    ),
}


@pytest.mark.parametrize("name", SHARDS)
def test_shards_with_pictures(name: str) -> None:
    files, kind, columns = SHARDS[name]
    write_shard("a.tar", [{**files, "npy": b"?"}] * 6)
    found = describe("a.tar")
    assert (found.kind, found.has_images) == (kind, True)
    assert set(columns) <= set(found.columns)
    assert "Not read in the archives: 6 .npy." in found.notes
    if kind == "classes":
        assert len(load_classification(ClassificationRecipe.load("a.tar")).train) == 5
    else:
        write_shard(
            "b.tar", [{**files, "json": json.dumps({"question": str(i), "answer": "A"}).encode()} for i in "xy"]
        )
        if name != "text":
            assert len(load_data("b.tar")["train"].with_format("arrow")["images"][0].as_py()) == 1 + (
                name == "several"
            )


# Splits


def splits_of(source: str) -> dict[str, int]:
    return {str(split): len(rows) for split, rows in load_data(source).items()}


def test_splits_by_the_names_of_files_and_folders(caplog: pytest.LogCaptureFixture) -> None:
    for name, count in (("train-00000", 8), ("train-00001", 8), ("validation", 3), ("test", 2)):
        write_jsonl(f"data/{name}.jsonl", rows_of("text", count))
    for source in ("data", "data/*.jsonl"):
        recipe = DataRecipe.load(source)
        assert recipe.splits == {"train": "train", "eval": "validation"}
        assert "Not read: the split test." in recipe.notes
    assert DataRecipe.load("data").data_files["train"] == ("data/train*.jsonl",)
    assert splits_of("data") == {"train": 16, "eval": 3}
    for name, count in (("train", 6), ("dev", 3)):
        write_jsonl(f"by_folder/{name}/x.jsonl", [{"text": f"{name} {i}"} for i in range(count)])
    assert splits_of("by_folder") == {"train": 6, "eval": 3}
    write_jsonl("one/questions.jsonl", [{"text": f"q {i}"} for i in range(6)])
    write_jsonl("one/eval.jsonl", [{"text": f"e {i}"} for i in range(2)])
    assert splits_of("one") == {"train": 6, "eval": 2}
    assert "one/questions.jsonl is read as train, by exclusion." in caplog.text


def test_saved_splits() -> None:
    parts = {
        name: Dataset.from_list([{"text": f"{name} {i}"} for i in range(4)]) for name in ("train_sft", "test_sft")
    }
    DatasetDict(**parts).save_to_disk("saved")
    assert DataRecipe.load("saved").splits == {"train": "train_sft", "eval": "test_sft"}


@pytest.mark.parametrize(("count", "held_out"), [(19, None), (20, 1), (100, 5), (20_000, 500)])
def test_what_is_held_out(count: int, held_out: int | None) -> None:
    write_jsonl("rows.jsonl", [{"text": str(i)} for i in range(count)])
    recipe = DataRecipe.load("rows.jsonl")
    assert recipe.eval_rows == held_out
    assert any("held out" in note for note in recipe.notes)
    if held_out == 5:
        first, again = load_data("rows.jsonl")["eval"]["text"][:], load_data("rows.jsonl")["eval"]["text"][:]
        assert first == again


# Names


def test_a_recipe_keeps_its_name() -> None:
    write_jsonl("python_docs/rows.jsonl", rows_of("text"))
    assert DataRecipe.load("python_docs").source == "json"
    assert "read as the data recipe of this name" in DataRecipe.load("python_docs").notes[0]
    assert DataRecipe.load("python_docs").data_files["train"] != ("python_docs/rows.jsonl",)
    assert DataRecipe.load("./python_docs").data_files["train"] == ("python_docs/rows.jsonl",)


def test_a_folder_with_a_data_recipe_is_read_by_it(caplog: pytest.LogCaptureFixture) -> None:
    write_jsonl("answers/rows.jsonl", rows_of("text"))
    keys = {"source": "json", "data_files": {"train": "rows.jsonl"}, "max_rows": 3}
    Path("answers/data.yaml").write_text(yaml.safe_dump(keys))
    assert splits_of("answers") == {"train": 3}
    assert "read by the data recipe in it, data.yaml" in caplog.text


def test_parts_of_a_mixture_are_named_directly() -> None:
    write_jsonl("recipes/a.jsonl", [{"text": f"a {i}"} for i in range(30)])
    write_jsonl("b.jsonl", [{"text": f"b {i}"} for i in range(30)])
    parts = [{"data": "a.jsonl", "weight": 1}, {"data": "./b.jsonl", "weight": 1}]
    Path("recipes/mixed.yaml").write_text(yaml.safe_dump({"mixture": parts}))
    assert splits_of("./recipes/mixed.yaml") == {"train": 56, "eval": 4}
    found = describe("./recipes/mixed.yaml")
    assert (found.kind, found.container) == ("text", "mixture")
    assert sum(found.rows.values()) == 60


HUB = """
import json, sys
from mmkd.data.load_data import load_data
from mmkd.data.source_description import describe
from mmkd.errors import UserError
said = []
for source in sys.argv[1:]:
    try:
        found = describe(source)
        sizes = {split: len(rows) for split, rows in load_data(source).items()}
        said.append([found.kind, found.container, found.recipe.splits, sizes])
    except UserError as error:
        said.append(str(error))
print(json.dumps(said))
"""


def test_data_sets_on_the_hub(tmp_path: Path) -> None:
    lines = {kind: "".join(json.dumps(row) + "\n" for row in rows_of(kind)).encode() for kind in ("chat", "alpaca")}
    card = "---\nconfigs:\n- config_name: a\n  data_files: a.jsonl\n- config_name: b\n  data_files: b.jsonl\n---\n"
    with loopback_hub() as hub:
        hub.create("dataset", "user/chats", {"train.jsonl": lines["chat"], "test.jsonl": lines["chat"]})
        hub.create(
            "dataset", "user/two", {"README.md": card.encode(), "a.jsonl": lines["chat"], "b.jsonl": lines["alpaca"]}
        )
        environment = {**os.environ, **hub.environment(tmp_path / "hf"), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        sources = ["user/chats", "user/two:b", "user/two", "user/none"]
        run = subprocess.run(
            [sys.executable, "-c", HUB, *sources], capture_output=True, text=True, env=environment, check=False
        )
    assert run.returncode == 0, run.stderr
    chats, alpaca, without_config, absent = json.loads(run.stdout.splitlines()[-1])
    assert chats[:3] == ["chat", "user/chats", {"train": "train", "eval": "test"}]
    assert alpaca == ["alpaca", "user/two", {"train": "train"}, {"train": 23, "eval": 1}]
    assert "several configs: a, b" in without_config
    assert absent.startswith("There is no file or folder user/none here. On the Hub:")


# What is refused


def unknown(folder: Path) -> str:
    return write_jsonl("odd.jsonl", [{"left": "a", "right": "b"}])


def broken(folder: Path) -> str:
    Path("rows.jsonl").write_text('{"text": "a"}\n{"text": \n')
    return "rows.jsonl"


def two_kinds(folder: Path) -> str:
    write_jsonl("both/a.jsonl", rows_of("text"))
    Path("both/b.csv").write_text("text\nx\n")
    return "both"


def empty(folder: Path) -> str:
    Path("empty").mkdir()
    return "empty"


def no_rows(folder: Path) -> str:
    Path("code").mkdir()
    Path("code/a.py").write_text("1")
    return "code"


def no_train(folder: Path) -> str:
    write_jsonl("held/test.jsonl", rows_of("text"))
    write_jsonl("held/val.jsonl", rows_of("text"))
    return "held"


def one_picture(folder: Path) -> str:
    return write_png("a.png")


def no_archive(folder: Path) -> str:
    Path("a.tar").write_bytes(b"no archive at all" * 100)
    return "a.tar"


def pictures_alone(folder: Path) -> str:
    write_png("flat/a.png")
    return "flat"


REFUSED: list[tuple[Any, str]] = [
    (unknown, r"no layout is known with the columns left, right.*columns: \{prompt: left, completion: right\}"),
    (broken, "line 2"),
    (two_kinds, "files of several kinds: 1 json .* and 1 csv"),
    (empty, "the folder empty is empty"),
    (no_rows, "has no rows that mmkd reads; it holds 1 .py"),
    (no_train, "named for test and validation, and none for train"),
    (one_picture, "is one picture. Name the folder"),
    (no_archive, "no readable tar archive"),
    (pictures_alone, "no layout is known with the columns image"),
    (lambda folder: "gone.jsonl", "no file, folder or data recipe at .*gone.jsonl"),
    (lambda folder: "gone/*.jsonl", r"no file, folder or data recipe at .*gone/\*.jsonl"),
    (lambda folder: "user/gone", "There is no file or folder user/gone here. On the Hub"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_cannot_be_read_is_refused(make: Any, message: str, tmp_path: Path) -> None:
    source = make(tmp_path)
    with pytest.raises(UserError, match=message):
        describe(source)
    with pytest.raises(UserError, match=message):
        load_data(source)


# Runs


def run_keys(**keys: Any) -> str:
    defaults = {"max_steps": 1, "report_to": "none", "save_strategy": "no", "per_device_train_batch_size": 2}
    text = yaml.safe_dump({**defaults, "output_dir": "run", "bf16": False, **keys})
    Path("run.yaml").write_text(text)
    return "run.yaml"


def test_a_run_of_a_file(tiny: dict[str, Path]) -> None:
    write_jsonl("rows.jsonl", rows_of("prompt_completion"))
    keys = {"method": "kd", "teacher": str(tiny["teacher"]), "student": str(tiny["student"]), "max_length": 64}
    assert main(["train", run_keys(data="rows.jsonl", **keys)]) == 0
    assert json.loads(Path("run/run.json").read_text())["data"]["source"] == "json"
    assert not is_recipe_file(Path("rows.jsonl"))


def test_prompts_alone_are_refused_with_a_way_out(tiny: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl("asked.jsonl", rows_of("prompts_only"))
    keys = {"method": "kd", "teacher": str(tiny["teacher"]), "student": str(tiny["student"])}
    assert main(["train", run_keys(data="asked.jsonl", **keys)]) == 2
    assert "on_policy_fraction" in capsys.readouterr().err


def test_a_classifier_of_class_folders(capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(8):
        write_png(f"colours/red/{i}.png")
        write_png(f"colours/blue/{i}.png", "blue")
    ViTConfig(**VISION).save_pretrained("student")
    pixels().save_pretrained("student")
    keys = {"method": "dho", "objective": "ce", "student": "student", "student_init": "random", "data": "colours"}
    assert main(["train", run_keys(**keys)]) == 0, capsys.readouterr().err
    assert json.loads(Path("run/config.json").read_text())["id2label"] == {"0": "blue", "1": "red"}


def test_a_wrong_path_names_the_nearest_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl("train_rows.jsonl", rows_of("chat"))
    with pytest.raises(UserError, match=r"train_row\.jsonl; did you mean train_rows\.jsonl\?"):
        DataRecipe.load("train_row.jsonl")
    with pytest.raises(UserError, match=r"part-\*\.jsonl; no file matches this glob"):
        DataRecipe.load("part-*.jsonl")
