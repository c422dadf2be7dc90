"""Fashion VQA: answers follow from the scene, no two pictures share a photo, files are the same every time."""

import gzip
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmkd.errors import UserError
from mmkd.prepare import fashion_vqa
from mmkd.prepare.fashion_vqa import (
    NAMES,
    PLACES,
    Scene,
    caption_of,
    make_fashion_vqa,
    picture_of,
    places_of,
    questions_of,
    scene_of,
)

SCENE = ("tee", "nothing", "boot", "tee")


def answers(scene: Scene, draws: int = 60) -> dict[str, str]:
    """Every question that is drawn about a scene, with its answer."""
    random = np.random.default_rng(0)
    return dict(row for _ in range(draws) for row in questions_of(scene, random))


@pytest.mark.parametrize(
    "question, answer",
    [
        ("what is in the first place?", "tee"),
        ("what is in the second place?", "nothing"),
        ("where is the boot?", "third"),
        ("what is beside the boot?", "tee"),
        ("what is above the boot?", "tee"),
        ("does the picture show a tee?", "yes"),
        ("does the picture show a bag?", "no"),
        ("does the picture show trousers?", "no"),
        ("how many tops are there?", "two"),
        ("how many shoes are there?", "one"),
        ("how many things are there?", "three"),
    ],
)
def test_answers_follow_from_the_scene(question: str, answer: str) -> None:
    assert answers(SCENE)[question] == answer


def test_nothing_that_is_there_twice_is_asked_for_by_its_name() -> None:
    assert not [question for question in answers(SCENE) if question in ("where is the tee?", "what is below the tee?")]
    assert answers(("trousers", "bag", "nothing", "nothing"))["where are the trousers?"] == "first"
    twice = answers(("bag", "nothing", "bag", "nothing"))
    assert {question.split()[0] for question in twice} == {"what", "does", "how"}


def test_a_question_is_never_answered_in_two_ways() -> None:
    random = np.random.default_rng(1)
    known: dict[str, str] = {}
    for _ in range(100):
        for question, answer in questions_of(SCENE, random):
            assert known.setdefault(question, answer) == answer


def test_a_caption_says_the_scene() -> None:
    assert caption_of(SCENE) == "first tee, second nothing, third boot, fourth tee."
    assert scene_of(caption_of(SCENE)) == SCENE


def test_photos_lie_in_their_places() -> None:
    photos = np.arange(1, 4, dtype=np.uint8)[:, None, None].repeat(28, 1).repeat(28, 2)
    picture = picture_of(photos, np.array([2, -1, -1, 0]))
    corners = picture[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert picture.shape == (56, 56)
    assert corners.tolist() == [3, 0, 0, 1]


def test_no_photo_is_in_two_pictures() -> None:
    places = places_of(400, 100, np.random.default_rng(0))
    used = places[places >= 0]
    assert len(set(used.tolist())) == len(used)
    assert Counter((places >= 0).sum(1).tolist()).keys() == {2, 3, 4}
    with pytest.raises(UserError, match="Fashion-MNIST's file holds 100"):
        places_of(100, 100, np.random.default_rng(0))


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small Fashion-MNIST, whose photos are all of one grey."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fashion_vqa, "PICTURES", {"train": 6, "validation": 2, "test": 3})
    for part in ("train", "t10k"):
        photos = np.arange(1, 41, dtype=np.uint8)[:, None, None].repeat(28, 1).repeat(28, 2)
        labels = np.arange(40, dtype=np.uint8) % len(NAMES)
        digest = hashlib.sha256(photos.tobytes() + labels.tobytes()).hexdigest()
        monkeypatch.setitem(fashion_vqa.SHA256, part, digest)
        for name, header, values in (("images-idx3", 16, photos), ("labels-idx1", 8, labels)):
            (tmp_path / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(bytes(header) + values.tobytes()))
    return tmp_path


def test_files_say_what_the_pictures_show(source: Path) -> None:
    assert make_fashion_vqa(source, Path("data")) == {"validation": 12, "train": 6, "test": 18, "captions": 6}

    def read(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in Path(f"data/{name}.jsonl").read_text().splitlines()]

    rows = {name: read(name) for name in ("train", "validation", "test", "captions")}
    pictures = {name: {row["images"][0] for row in part} for name, part in rows.items()}
    assert pictures["train"] == pictures["captions"]
    assert not pictures["train"] & pictures["validation"]
    # A conversation shows its picture once.
    for row in rows["train"]:
        parts = [part["type"] for message in row["messages"] for part in message["content"]]
        assert parts == ["image", *["text"] * 12]
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * 6
    for row in rows["captions"]:
        picture = np.array(Image.open(row["images"][0]))
        scene = scene_of(row["messages"][1]["content"][0]["text"])
        grey = picture[[0, 0, -1, -1], [0, -1, 0, -1]].tolist()
        assert scene == tuple(NAMES[(value - 1) % 10] if value else "nothing" for value in grey)
    assert len(scene) == len(PLACES)


def test_files_are_the_same_every_time_and_others_are_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_fashion_vqa(source, Path("data"))
    before = {path: path.read_bytes() for path in Path("data").rglob("*.*")}
    # What an interruption has left is completed.
    Path("data/images/train/3.png").write_bytes(b"cut")
    Path("data/test.jsonl").unlink()
    make_fashion_vqa(source, Path("data"))
    assert {path: path.read_bytes() for path in Path("data").rglob("*.*")} == before
    monkeypatch.setitem(fashion_vqa.SHA256, "t10k", "0" * 64)
    with pytest.raises(UserError, match="they are not Fashion-MNIST's"):
        make_fashion_vqa(source, Path("data"))
