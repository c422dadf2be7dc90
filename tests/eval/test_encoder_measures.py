"""`mmkd eval` of dual encoders, against the same numbers computed by hand with transformers and scikit-learn."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Image as Pictures
from PIL import Image
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel, AutoProcessor

from mmkd.commands.main import main
from mmkd.results.scores import scores_of
from tests.classes import pictures
from tests.dual_encoders import caption, make_clip, make_sentence_encoder, make_siglip, photo

NAMES = ["red", "green", "blue"]


@pytest.fixture
def clip(tmp_path: Path) -> str:
    return str(make_clip(tmp_path / "clip"))


@pytest.fixture
def captions(tmp_path: Path) -> str:
    """Data whose eight held-out pictures have six different captions, two of them on one picture."""
    rows = []
    for number in range(10):
        photo(number).save(tmp_path / f"{number}.png")
        texts = [caption(number % 5), "a photo of a star"] if number == 3 else [caption(number % 5)]
        rows += [{"image": str(tmp_path / f"{number}.png"), "text": text} for text in texts]
    for name, own in (("train", rows[:2]), ("eval", rows[2:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, own)))
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "eval")}
    recipe = {"name": "photos", "source": "json", "data_files": files, "splits": {name: name for name in files}}
    (tmp_path / "photos.yaml").write_text(yaml.safe_dump(recipe))
    return str(tmp_path / "photos.yaml")


@pytest.fixture
def classes(tmp_path: Path) -> str:
    """Pictures of three colours in a recipe of classes."""
    files = {}
    for seed, (name, count) in enumerate({"train": 4, "validation": 3, "test": 5}.items()):
        files[name] = str(tmp_path / f"{name}.parquet")
        pictures(count, seed).to_parquet(files[name])
    recipe = {"name": "colours", "source": "parquet", "data_files": files, "splits": {name: name for name in files}}
    recipe |= {"image": "image", "class_names": NAMES, "prompts": ["a photo of the {} .", "a {} circle"]}
    (tmp_path / "colours.yaml").write_text(yaml.safe_dump(recipe))
    return str(tmp_path / "colours.yaml")


def scores(path: Path) -> dict[str, float]:
    entries = json.loads(path.read_text())["tasks"].values()
    told = [score for entry in entries for score in scores_of(entry)]
    return {f"{score['task']} {score['metric'].removesuffix(',none')}": score["value"] for score in told}


def unit(features: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(features, dim=-1).numpy()


class ByHand:
    """Unit features, with transformers alone."""

    def __init__(self, folder: str) -> None:
        self.model: Any = AutoModel.from_pretrained(folder).eval()
        self.processor = AutoProcessor.from_pretrained(folder)

    @torch.no_grad()
    def images(self, images: list[Image.Image]) -> np.ndarray:
        return unit(self.model.get_image_features(**self.processor(images=images, return_tensors="pt")).pooler_output)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> np.ndarray:
        padding = "max_length" if "siglip" in self.model.config.model_type else True
        inputs = self.processor(text=texts, padding=padding, return_tensors="pt")
        return unit(self.model.get_text_features(**inputs).pooler_output)


@pytest.mark.parametrize("make", [make_clip, make_siglip])
def test_recall_is_that_of_a_plain_sort(make: Any, captions: str, tmp_path: Path) -> None:
    model = str(make(tmp_path / "model"))
    assert main(["eval", model, "--measures", "recall", "--data", captions, "--output", str(tmp_path / "out")]) == 0
    told = scores(tmp_path / "out" / "results.json")
    shown = [photo(number) for number in range(2, 10)]
    texts = [*dict.fromkeys(caption(number % 5) for number in range(2, 10)), "a photo of a star"]
    right = np.array([[caption(number % 5) == text for text in texts] for number in range(2, 10)])
    right[1, -1] = True
    hand = ByHand(model)
    similarity = hand.images(shown) @ hand.texts(texts).T
    for side, matrix, wanted in (("image_to_text", similarity, right), ("text_to_image", similarity.T, right.T)):
        order = np.argsort(-matrix, axis=1)
        for count in (1, 5):
            hits = np.take_along_axis(wanted, order[:, :count], axis=1).any(1)
            assert told[f"photos {side} recall@{count}"] == pytest.approx(hits.mean())


def test_classes_are_those_of_the_nearest_text_and_of_a_probe(classes: str, clip: str, tmp_path: Path) -> None:
    words = ["eval", clip, "--measures", "--data", classes, "--output", str(tmp_path / "out")]
    assert main([*words, "--unseen_classes", "blue"]) == 0
    told = scores(tmp_path / "out" / "results.json")
    hand = ByHand(clip)
    prompts = ["a photo of the {} .", "a {} circle"]
    means = np.stack([hand.texts([prompt.format(name) for prompt in prompts]).mean(0) for name in NAMES])
    weights = means / np.linalg.norm(means, axis=1, keepdims=True)

    def side(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        rows: Any = pictures(count, seed).cast_column("image", Pictures())
        return hand.images([image.convert("RGB") for image in rows["image"]]), np.array(rows["label"])

    train, validation, (features, labels) = side(4, 0), side(3, 1), side(5, 2)
    right = (features @ weights.T).argmax(1) == labels
    assert told["colours zero_shot acc"] == pytest.approx(right.mean())
    assert told["colours zero_shot unseen_classes_acc"] == pytest.approx(right[labels == 2].mean())
    assert told["colours zero_shot seen_classes_acc"] == pytest.approx(right[labels != 2].mean())
    entry = next(
        entry
        for entry in json.loads((tmp_path / "out" / "results.json").read_text())["tasks"].values()
        if "chosen" in entry
    )
    both = [np.concatenate(pair) for pair in zip(train, validation, strict=True)]
    probe = LogisticRegression(C=entry["chosen"]["C"], max_iter=1000).fit(*both)
    assert told["colours linear_probe acc"] == pytest.approx(probe.score(features, labels))


def test_what_is_known_is_not_measured_again(classes: str, clip: str, tmp_path: Path, capsys: Any) -> None:
    words = ["eval", clip, "--measures", "zero_shot", "--data", classes, "--output", str(tmp_path / "out")]
    assert main(words) == 0
    assert "zero_shot on colours" in capsys.readouterr().err
    assert main(words) == 0
    assert "zero_shot on colours" not in capsys.readouterr().err
    assert main([*words, "--prompts", "clip_7"]) == 0
    assert "zero_shot on colours" in capsys.readouterr().err


def refusal(words: list[str], capsys: Any) -> str:
    assert main(["eval", *words]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_what_cannot_be_measured_is_refused(
    classes: str, captions: str, clip: str, tmp_path: Path, capsys: Any
) -> None:
    assert "needs rows with classes" in refusal([clip, "--measures", "zero_shot", "--data", captions], capsys)
    assert "needs rows with captions" in refusal([clip, "--measures", "recall", "--data", classes], capsys)
    assert "has no measure 'bytes'" in refusal([clip, "--measures", "recall", "bytes", "--data", captions], capsys)
    assert "comes from no run" in refusal([clip, "--measures", "recall"], capsys)
    assert "the classes are red, green, blue" in refusal(
        [clip, "--measures", "--data", classes, "--unseen_classes", "pink"], capsys
    )
    (tmp_path / "own.txt").write_text("a photo of the the the the the the the the the the {}\n")
    shortened = [clip, "--measures", "zero_shot", "--data", classes, "--prompts", str(tmp_path / "own.txt")]
    assert "'red' and 'green' are the same tokens" in refusal(shortened, capsys)
    assert "--prompts is of --measures zero_shot" in refusal([clip, "--suite", "offline", "--prompts", "x"], capsys)


def test_a_model_that_diverged_is_refused(captions: str, clip: str, capsys: Any) -> None:
    model: Any = AutoModel.from_pretrained(clip)
    with torch.no_grad():
        model.visual_projection.weight.fill_(float("nan"))
    model.save_pretrained(clip)
    assert "features of images are not finite" in refusal([clip, "--measures", "--data", captions], capsys)


def test_an_encoder_of_sentences_is_measured_on_pairs_of_texts(tmp_path: Path, capsys: Any, classes: str) -> None:
    pytest.importorskip("sentence_transformers")
    model = str(make_sentence_encoder(tmp_path / "model"))
    rows = [{"text": caption(number), "pair": f"the picture of {caption(number)}"} for number in range(12)]
    for name, own in (("train", rows[:4]), ("eval", rows[4:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, own)))
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "eval")}
    recipe = {"name": "pairs", "source": "json", "data_files": files, "splits": {name: name for name in files}}
    (tmp_path / "pairs.yaml").write_text(yaml.safe_dump(recipe))
    words = ["eval", model, "--measures", "--data", str(tmp_path / "pairs.yaml"), "--output", str(tmp_path / "out")]
    assert main(words) == 0
    from sentence_transformers import SentenceTransformer

    encoder: Any = SentenceTransformer(model, device="cpu")
    firsts, seconds = (
        unit(torch.tensor(encoder.encode([row[side] for row in rows[4:]]))) for side in ("text", "pair")
    )
    hits = (firsts @ seconds.T).argmax(1) == np.arange(8)
    told = scores(tmp_path / "out" / "results.json")
    assert told["pairs image_to_text recall@1"] == pytest.approx(hits.mean())
    assert "is an encoder of sentences" in refusal([model, "--measures", "--data", classes], capsys)
