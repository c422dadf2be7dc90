"""Write Fashion VQA: pictures of several clothes of Fashion-MNIST, with captions and questions about them.

Every picture (56 x 56 pixels) has four places, of which two to four hold a photo of Fashion-MNIST (Zalando, MIT).
Every photo is in one picture only, and test pictures are made of photos of the original test split. The answers follow
from Fashion-MNIST's labels. Writes the pictures and train.jsonl, validation.jsonl, test.jsonl and captions.jsonl (of
the training pictures). There are six questions on each picture: in one conversation for training, and one by one else.
"""

import argparse
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from mmkd.errors import UserError
from mmkd.files import write_file

from .easy_vqa import INSTRUCTIONS, QuestionRow, rows
from .fashion_mnist import SOURCE, read

OUTPUT_DIR = Path(".cache/mmkd/fashion_vqa")
PICTURES = {"train": 5_000, "validation": 500, "test": 1_000}
"""How many pictures each split has."""
SHA256 = {
    "train": "16d82e2b505296aa2b78bd5ea0992634f30419a4c97def7c907d154a35ac6157",
    "t10k": "9f1ec356a747bfe4ebab3cfb722d3694c9ca737e2570f6f90cf31d7b6fd689d4",
}
"""Of the pixels and the labels of each part of Fashion-MNIST, one after the other."""

SIDE = 28
NAMES = ("tee", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
"""Fashion-MNIST's classes in one word each, by their numbers."""
NOTHING = "nothing"
PLACES = ("first", "second", "third", "fourth")
"""The two above and the two below, each pair from left to right."""
GROUPS = {"tops": ("tee", "pullover", "coat", "shirt"), "shoes": ("sandal", "sneaker", "boot"), "things": NAMES}
NUMBERS = ("zero", "one", "two", "three", "four")

Scene = tuple[str, ...]
"""What is in the four places, in the order of `PLACES`."""
Places = Int[np.ndarray, "scene 4"]
"""The number of the photo in each place, -1 where there is none."""


def places_of(photos: int, scenes: int, random: np.random.Generator) -> Places:
    """Scenes of two, three or four photos in random places, in which no photo occurs twice.

    Raises UserError if there are too few photos.
    """
    sizes = random.integers(2, len(PLACES) + 1, scenes)
    if sizes.sum() > photos:
        raise UserError(f"{scenes:,} pictures need {sizes.sum():,} photos, and Fashion-MNIST's file holds {photos:,}.")
    order = random.permutation(photos)[: sizes.sum()]
    places = np.full((scenes, len(PLACES)), -1)
    taken = np.stack([random.permutation(len(PLACES)) < size for size in sizes])
    places[taken] = order
    return places


def picture_of(photos: UInt8[np.ndarray, "photo 28 28"], places: Int[np.ndarray, "4"]) -> UInt8[np.ndarray, "56 56"]:
    """The photos in their places, black where there is none."""
    cells = [np.zeros((SIDE, SIDE), np.uint8) if photo < 0 else photos[photo] for photo in places]
    return np.block([cells[:2], cells[2:]])


def caption_of(scene: Scene) -> str:
    """What a scene shows, place by place."""
    return ", ".join(f"{place} {name}" for place, name in zip(PLACES, scene, strict=True)) + "."


def scene_of(caption: str) -> Scene:
    """The scene of a caption."""
    return tuple(part.split()[1] for part in caption.removesuffix(".").split(", "))


def questions_of(scene: Scene, random: np.random.Generator) -> list[tuple[str, str]]:
    """Six questions about a scene with their answers: what is where, whether and how many there are."""

    def pick(options: tuple[str, ...]) -> str:
        return options[random.integers(len(options))]

    shown = tuple(name for name in scene if name != NOTHING)
    absent = tuple(name for name in NAMES if name not in shown)
    asked = pick(shown if random.random() < 0.5 else absent)
    group = pick(tuple(GROUPS))
    number = NUMBERS[sum(name in GROUPS[group] for name in shown)]
    places = random.permutation(len(PLACES))[:2]
    questions = [(f"what is in the {PLACES[place]} place?", scene[place]) for place in places]
    questions.append((f"does the picture show {_with_article(asked)}?", "yes" if asked in shown else "no"))
    questions.append((f"how many {group} are there?", number))
    # Where two are alike, neither can be asked for by its name.
    alone = tuple(name for name in shown if shown.count(name) == 1)
    if not alone:
        others = [place for place in range(len(PLACES)) if place not in places]
        return questions + [(f"what is in the {PLACES[place]} place?", scene[place]) for place in others]
    name = pick(alone)
    questions.append((f"where {'are' if name == 'trousers' else 'is'} the {name}?", PLACES[scene.index(name)]))
    name = pick(alone)
    place = scene.index(name)
    direction, other = (
        ("beside", place ^ 1) if random.random() < 0.5 else ("below" if place < 2 else "above", place ^ 2)
    )
    questions.append((f"what is {direction} the {name}?", scene[other]))
    return questions


def conversations(questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows about the same picture, one after the other, as one conversation that shows it once."""
    joined: dict[str, dict[str, Any]] = {}
    for row in questions:
        (image,) = row["images"]
        if image not in joined:
            joined[image] = row
            continue
        asked, answered = row["messages"]
        text = {"role": "user", "content": [part for part in asked["content"] if part["type"] == "text"]}
        joined[image]["messages"].extend([text, answered])
    return list(joined.values())


def _with_article(name: str) -> str:
    return name if name == "trousers" else f"a {name}"


def make_fashion_vqa(source: Path, output_dir: Path) -> dict[str, int]:
    """Writes all files; returns the number of rows of each. Raises UserError if the original files are others."""
    parts = {part: _checked(source, part) for part in ("train", "t10k")}
    questions: dict[str, list[QuestionRow]] = {}
    captions: list[QuestionRow] = []
    held_out = PICTURES["validation"]
    for part, (photos, labels) in parts.items():
        random = np.random.default_rng(0)
        count = PICTURES["train"] + held_out if part == "train" else PICTURES["test"]
        places = places_of(len(photos), count, random)
        folder = output_dir / "images" / ("train" if part == "train" else "test")
        folder.mkdir(parents=True, exist_ok=True)
        for number, own in enumerate(places):
            _write_picture(folder / f"{number}.png", picture_of(photos, own))
            scene = tuple(NOTHING if photo < 0 else NAMES[labels[photo]] for photo in own)
            split = "test" if part == "t10k" else "validation" if number < held_out else "train"
            asked = [(question, answer, number) for question, answer in questions_of(scene, random)]
            random.shuffle(asked)
            questions.setdefault(split, []).extend(asked)
            if split == "train":
                captions.append((INSTRUCTIONS[number % len(INSTRUCTIONS)], caption_of(scene), number))
    images = output_dir / "images"
    files = {
        split: rows(asked, images / ("test" if split == "test" else "train")) for split, asked in questions.items()
    }
    files["train"] = conversations(files["train"])
    files["captions"] = rows(captions, images / "train")
    for name, part in files.items():
        write_file(output_dir / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in part))
    return {name: len(part) for name, part in files.items()}


def _checked(source: Path, part: str) -> tuple[UInt8[np.ndarray, "photo 28 28"], UInt8[np.ndarray, "photo"]]:
    """Photos and labels of one part of Fashion-MNIST, which are those that the numbers in the cards are about."""
    photos, labels = read(source, part)
    digest = hashlib.sha256(photos.tobytes() + labels.tobytes()).hexdigest()
    if digest != SHA256[part]:
        raise UserError(
            f"The pixels and labels of {source}/{part}-* have sha256 {digest}, not {SHA256[part]}: they are not "
            "Fashion-MNIST's. Download its files again (github.com/zalandoresearch/fashion-mnist)."
        )
    return photos, labels


def _write_picture(path: Path, pixels: UInt8[np.ndarray, "56 56"]) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    path.write_bytes(buffer.getvalue())


def main(arguments: list[str] | None = None) -> None:
    """The command line of scripts/make_fashion_vqa.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=SOURCE, help="folder of the four *-ubyte.gz files")
    parser.add_argument("--output_dir", type=Path, default=OUTPUT_DIR, help=f"where to write (default: {OUTPUT_DIR})")
    options = parser.parse_args(arguments)
    for name, count in make_fashion_vqa(options.source, options.output_dir).items():
        print(f"{options.output_dir / name}.jsonl: {count:,} rows")
