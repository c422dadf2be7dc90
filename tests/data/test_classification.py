"""Recipes of classes: what is read, how labels and names fit, and what is refused."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage

from mmkd.data.classification import HIDDEN, ClassificationRecipe, load_classification
from tests.classes import NAMES, pictures

# The sources on the Hub: number of classes, splits, and columns besides image and label.
HUB: dict[str, tuple[int, tuple[str, ...], dict[str, Any]]] = {
    "caltech101": (102, ("train", "test"), {}),
    "dtd": (47, ("train", "test"), {}),
    "eurosat": (10, ("train", "test"), {}),
    "fgvc_aircraft": (100, ("train", "val", "test"), {}),
    "food101": (101, ("train", "validation"), {}),
    "imagenet_1k": (1000, ("train", "validation", "test"), {}),
    "oxford_flowers": (102, ("train", "validation", "test"), {}),
    "oxford_pets": (37, ("train", "test"), {"image_id": "string"}),
    "stanford_cars": (196, ("train", "test"), {}),
    "sun397": (397, ("train", "test"), {}),
    "ucf101": (101, ("train", "test"), {"video_id": "string", "clip_id": "string", "frame": "int64"}),
}
SHIPPED = sorted((Path(__file__).parents[2] / "data_recipes" / "classification").glob("*.yaml"))


def write(folder: Path, rows: dict[str, Dataset], **keys: Any) -> Path:
    """A recipe of splits, which lie beside it."""
    for split, dataset in rows.items():
        dataset.to_parquet(str(folder / f"{split}.parquet"))
    files = {split: f"{split}.parquet" for split in rows}
    recipe = {"source": "parquet", "data_files": files, "splits": {split: split for split in rows}, **keys}
    (folder / "data.yaml").write_text(yaml.safe_dump({"image": "image", "class_names": NAMES, **recipe}))
    return folder / "data.yaml"


def load(folder: Path, rows: dict[str, Dataset], **keys: Any) -> Any:
    return load_classification(ClassificationRecipe.load(write(folder, rows, **keys)))


def texts(labels: list[Any]) -> Dataset:
    return Dataset.from_dict({"body": [f"text {number}" for number in range(len(labels))], "label": labels})


def test_splits_columns_and_names(tmp_path: Path) -> None:
    data = load(tmp_path, {"train": pictures(3), "test": pictures(2), "unlabeled": pictures(4, seed=1)})
    assert data.class_names == tuple(NAMES)
    assert (len(data.train), len(data.test), data.validation) == (9, 6, None)
    assert data.train.column_names == ["image", "label"]
    assert set(data.unlabeled["label"]) == {HIDDEN}


def test_texts_and_labels_by_name(tmp_path: Path) -> None:
    data = load(tmp_path, {"train": texts(["blue", "red"])}, image=None, text="body")
    assert data.train[0] == {"text": "text 0", "label": 2}


def test_names_that_the_data_declares(tmp_path: Path) -> None:
    rows = pictures(2).cast_column("label", ClassLabel(names=["dark_red", "green", "blue"]))
    assert load(tmp_path, {"train": rows}, class_names=[]).class_names == ("dark red", "green", "blue")


def test_validation_rows_are_held_out_by_class(tmp_path: Path) -> None:
    data = load(tmp_path, {"train": pictures(5)}, validation_per_class=2)
    assert sorted(data.validation["label"]) == [0, 0, 1, 1, 2, 2]
    assert sorted(data.train["label"]) == [0] * 3 + [1] * 3 + [2] * 3
    held, kept = ([image["bytes"] for image in rows["image"]] for rows in (data.validation, data.train))
    assert not set(held) & set(kept)
    again = load(tmp_path, {"train": pictures(5)}, validation_per_class=2)
    assert [image["bytes"] for image in again.validation["image"]] == held


@pytest.mark.parametrize(
    ("labels", "keys", "says"),
    [
        ([0, 1, 5], {}, "label 5, but there are 3 class names"),
        ([0, -1, 2], {}, "label -1, but there are 3"),
        ([0, None, 2], {}, "label None"),
        (["red", "gren", "blue"], {}, "label 'gren', which is none of the class names; did you mean 'green'"),
        ([[0, 1], [2], [1]], {}, "can have several classes"),
        ([0, 1, 2], {"class_names": []}, "declares no names"),
        ([0, 1, 2], {"label": "lable"}, "there is no column 'lable'; did you mean 'label'"),
        ([0, 1, 2], {"text": "bdy"}, "has no column 'bdy'; did you mean 'body'"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, labels: list[Any], keys: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load(tmp_path, {"train": texts(labels)}, **{"image": None, "text": "body", **keys})


def test_another_number_of_names_is_refused(tmp_path: Path) -> None:
    rows = pictures(2).cast_column("label", ClassLabel(names=[*NAMES, "black"]))
    with pytest.raises(ValueError, match=r"class_names has 3 names, the labels are of 4 classes \(red, green, blue"):
        load(tmp_path, {"train": rows})


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"promts": ["{}"]}, "unknown key 'promts'; did you mean 'prompts'"),
        ({"prompts": ["a photo."]}, "needs {} once"),
        ({"splits": {"train": "train", "tset": "test"}}, "splits has 'tset'; did you mean 'test'"),
        ({"splits": {"train": "train", "test": "train"}}, "reads two of its splits from the same rows"),
        ({"splits": {"test": "train"}}, "names no train split"),
        ({"class_names": ["a", "b", "a"]}, "'a' twice"),
        ({"text": "body"}, "set one of image and text"),
        ({"source": ""}, "give source"),
        (
            {"data_files": {"train": "other.parquet"}, "prepare": "make it"},
            "there is no file .*make it with `make it`",
        ),
    ],
)
def test_recipes_that_cannot_be_are_refused(tmp_path: Path, keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load(tmp_path, {"train": pictures(1)}, **keys)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_say_what_a_reader_needs(path: Path) -> None:
    recipe = ClassificationRecipe.load(path)
    assert recipe.name == path.stem
    assert recipe.description
    assert recipe.license
    assert recipe.homepage
    assert recipe.prompts
    assert "test" in recipe.splits
    assert "validation" in recipe.splits or recipe.validation_per_class
    if "/" in recipe.source:
        # Where no commit could be looked up, the recipe must say so.
        unpinned = "# Not pinned to a commit" in path.read_text()
        assert recipe.revision == "main" if unpinned else len(recipe.revision or "") == 40


def test_shipped_recipes_read_the_hub() -> None:
    assert {path.stem for path in SHIPPED if "/" in ClassificationRecipe.load(path).source} == set(HUB)


@pytest.mark.parametrize("name", HUB)
def test_shipped_recipes_fit_their_sources(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    number, splits, others = HUB[name]
    png = io.BytesIO()
    PILImage.new("RGB", (2, 2)).save(png, "png")
    cells = {"int64": 1, "string": "x", "image": {"bytes": png.getvalue(), "path": None}}
    features = Features(
        {"image": Image(), "label": ClassLabel(names=[f"class_{label}" for label in range(number)])}
        | {column: Value(kind) for column, kind in others.items()}
    )
    asked: list[tuple[str, str, str]] = []

    def load_dataset(source: str, *, name: None, revision: str, data_files: None, split: str) -> Dataset:
        asked.append((source, revision, split))
        assert split in splits
        labels = [*range(number), *range(number)]
        columns = {"image": [cells["image"]] * len(labels), "label": labels}
        columns |= {column: [cells[kind]] * len(labels) for column, kind in others.items()}
        return Dataset.from_dict(columns, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    recipe = ClassificationRecipe.load(f"classification/{name}")
    held_out = recipe.validation_per_class and 1
    data = load_classification(dataclasses.replace(recipe, validation_per_class=held_out))
    assert asked == [(recipe.source, recipe.revision, split) for split in recipe.splits.values()]
    assert data.train.column_names == ["image", "label"]
    assert data.class_names == recipe.class_names or data.class_names[-1] == f"class {number - 1}"
    assert len(data.train) == (number if held_out else 2 * number)
    assert data.validation is not None
    assert data.test is not None
