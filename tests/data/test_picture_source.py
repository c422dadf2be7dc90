"""Pictures of any data without their texts: which there are, which are the same, and what is said of the others."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmkd.data.picture_source import load_pictures, picture_facts
from mmkd.errors import UserError
from tests.classes import NAMES, pictures


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Twelve different pictures in folders of classes."""
    paths = []
    for number, row in enumerate(pictures(4)):
        value: Any = row
        path = tmp_path / "photos" / NAMES[value["label"]] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value["image"]["bytes"])
        paths.append(path)
    return paths


def rows_of(folder: Path, images: list[Any]) -> Path:
    lines = [
        json.dumps(
            {
                "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}],
                "images": own,
            }
        )
        for own in images
    ]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_a_folder_of_pictures_needs_no_texts_and_no_classes(files: list[Path], tmp_path: Path) -> None:
    assert len(load_pictures(str(tmp_path / "photos")).train) == 12
    assert len(load_pictures(str(files[0].parent)).train) == 4
    assert load_pictures(str(tmp_path / "photos")).train[0].size == (8, 8)


def test_conversations_give_each_picture_once(files: list[Path], tmp_path: Path, caplog: Any) -> None:
    shown = [[str(files[0])], [str(files[0])], [str(files[1]), str(files[2])], []]
    split = load_pictures(str(rows_of(tmp_path, shown))).train
    assert split.places == ((0, 0), (2, 0), (2, 1))
    assert [note.partition(": ")[2] for note in split.notes] == [
        "1 train row without a picture left out.",
        "3 different train pictures; 1 repetitions left out.",
    ]
    assert all(note in caplog.text for note in split.notes)


def test_what_is_held_out_is_not_learnt(files: list[Path], tmp_path: Path) -> None:
    rows_of(tmp_path, [[str(path)] for path in files])
    (tmp_path / "held.jsonl").write_text((tmp_path / "rows.jsonl").read_text().splitlines()[3])
    recipe = {"source": "json", "splits": {"train": "train", "eval": "validation"}}
    recipe |= {"data_files": {"train": str(tmp_path / "rows.jsonl"), "validation": str(tmp_path / "held.jsonl")}}
    recipe |= {"columns": {"messages": "messages", "images": "images"}, "license": "mit"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    found = load_pictures(str(path))
    assert (len(found.train), len(found.held_out or [])) == (11, 1)
    assert "which the held-out rows show too" in found.train.notes[-1]
    assert picture_facts(str(path))["license"] == "mit"
    assert len(load_pictures(str(path), max_train_rows=5).train) == 5


def test_a_recipe_of_classes(tmp_path: Path) -> None:
    pictures(4).to_parquet(str(tmp_path / "rows.parquet"))
    recipe = {"source": "parquet", "data_files": {"train": str(tmp_path / "rows.parquet")}, "image": "image"}
    recipe |= {"splits": {"train": "train"}, "class_names": NAMES, "validation_per_class": 1}
    path = tmp_path / "classes.yaml"
    path.write_text(yaml.safe_dump(recipe))
    found = load_pictures(str(path))
    assert (len(found.train), len(found.held_out or [])) == (9, 3)
    assert len(load_pictures(str(tmp_path / "rows.parquet")).train) == 12


def test_a_picture_that_cannot_be_read_is_named(files: list[Path], tmp_path: Path) -> None:
    files[1].write_bytes(b"no picture")
    split = load_pictures(str(rows_of(tmp_path, [[str(files[0])], [str(files[1])]]))).train
    with pytest.raises(UserError, match=f"row 1 of the train data.*{files[1].name}"):
        split[1]


@pytest.mark.parametrize(
    ("images", "reason"), [([[], []], "none of the 2 train rows has a picture"), (None, "have no pictures")]
)
def test_data_without_pictures(images: list[Any] | None, reason: str, tmp_path: Path) -> None:
    path = rows_of(tmp_path, images or [])
    if images is None:
        path.write_text('{"text": "words"}\n{"text": "more words"}\n')
    with pytest.raises(UserError, match=reason):
        load_pictures(str(path))
