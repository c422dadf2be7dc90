"""Pictures with captions of any layout: each picture once, all that is said of it, and what is left out."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from mmkd.data.caption_source import captioned_split, load_captions
from mmkd.errors import UserError
from tests.classes import pictures


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Six different pictures."""
    paths = []
    for number, row in enumerate(pictures(2)):
        value: Any = row
        path = tmp_path / f"{number}.png"
        path.write_bytes(value["image"]["bytes"])
        paths.append(str(path))
    return paths


def written(folder: Path, rows: list[dict[str, Any]], **keys: Any) -> str:
    """A data recipe of these rows."""
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe: dict[str, Any] = {
        "source": "json",
        "data_files": {"train": str(folder / "rows.jsonl")},
        "splits": {"train": "train"},
    }
    recipe["shuffle_seed"] = None
    (folder / "data.yaml").write_text(yaml.safe_dump({"name": "captions", **recipe, **keys}))
    return str(folder / "data.yaml")


def test_rows_of_one_picture_are_joined(files: list[str], tmp_path: Path) -> None:
    rows = [{"image": files[0], "text": "a cat"}, {"image": files[1], "text": "a dog"}]
    rows += [{"image": files[0], "text": "an animal"}, {"image": files[0], "text": "a cat"}]
    split = load_captions(written(tmp_path, rows)).train
    assert split.captions == (("a cat", "an animal"), ("a dog",))
    assert split.texts == ["a cat", "an animal", "a dog"]
    assert split[1][0].size == (8, 8)


def test_a_column_may_list_captions(files: list[str], tmp_path: Path, caplog: Any) -> None:
    rows = [{"image": files[0], "captions": [" a cat ", "an animal"], "id": 1}]
    rows += [
        {"image": files[1], "captions": ["", None], "id": 2},
        {"image": files[2], "captions": ["a bird"], "id": 3},
    ]
    assert load_captions(written(tmp_path, rows)).train.captions == (("a cat", "an animal"), ("a bird",))
    assert "1 train row without a caption left out." in caplog.text
    data = load_captions(written(tmp_path, rows, eval_rows=1, shuffle_seed=0))
    assert data.held_out is not None
    assert len(data.train) + len(data.held_out) == 2


def test_answers_of_conversations_are_captions(files: list[str], tmp_path: Path) -> None:
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "describe it."}]}
    rows = [
        {"messages": [asked, {"role": "assistant", "content": [{"type": "text", "text": name}]}], "images": [path]}
        for name, path in zip(("a cat", "a dog"), files, strict=False)
    ]
    assert load_captions(written(tmp_path, rows)).train.captions == (("a cat",), ("a dog",))


def test_what_is_held_out_is_not_learnt(files: list[str], tmp_path: Path, caplog: Any) -> None:
    rows = [{"image": path, "text": f"picture {number}"} for number, path in enumerate(files)]
    (tmp_path / "held.jsonl").write_text(json.dumps({"image": files[0], "text": "the first"}))
    held = {"data_files": {"train": str(tmp_path / "rows.jsonl"), "held": str(tmp_path / "held.jsonl")}}
    data = load_captions(written(tmp_path, rows, **held, splits={"train": "train", "eval": "held"}), max_train_rows=3)
    assert data.held_out is not None
    assert data.held_out.texts == ["the first"]
    assert len(data.train) == 3
    assert "picture 0" not in data.train.texts
    assert "1 picture of the train data" in caplog.text


def test_rows_that_are_no_pairs_are_counted_or_refused(files: list[str]) -> None:
    rows = {"images": [[files[0]], [], [files[1], files[2]], [files[3]]], "text": ["a cat", "a dog", "two", " "]}
    split = captioned_split(Dataset.from_dict(rows), "mine", "train")
    assert split.captions == (("a cat",),)
    assert [note.removeprefix("mine: 1 train row ") for note in split.notes] == [
        "without a picture left out.",
        "with several pictures left out.",
        "without a caption left out.",
    ]
    with pytest.raises(UserError, match="none of the 2 train rows has one picture and a caption"):
        captioned_split(Dataset.from_dict({"image": files[:2], "text": ["", " "]}), "mine", "train")
    with pytest.raises(UserError, match="have no pictures"):
        captioned_split(Dataset.from_dict({"text": ["a cat"]}), "mine", "train")


def test_several_answers_of_a_row_are_said(files: list[str]) -> None:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}] * 2
    split = captioned_split(Dataset.from_dict({"images": [[files[0]]], "messages": [turns]}), "mine", "train")
    assert split.notes == ("mine: 1 train row of several answers; each is taken for a caption.",)
