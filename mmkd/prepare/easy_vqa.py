"""Write easy-VQA as rows with images: 4,000 training pictures of coloured shapes and 38,575 questions about them.

The data is Victor Zhou's easy-vqa 1.0 (MIT), taken from its Python package, checked against its sha256. Writes the
pictures, train.jsonl, validation.jsonl (the pictures of one tenth of the training set), test.jsonl (the package's own
test set), and captions.jsonl: what the training pictures show, as their questions say.
"""

import argparse
import hashlib
import json
import re
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from mmkd.files import write_file

from .packages import check_sha256, download

PACKAGE = "easy-vqa==1.0"
SHA256 = "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f"
OUTPUT_DIR = Path(".cache/mmkd/easy_vqa")
HELD_OUT_ONE_IN = 10
SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
INSTRUCTIONS = ("describe the image.", "what does the image show?", "write a caption.")

QuestionRow = tuple[str, str, int]
"""Question, answer, number of the picture."""


def is_held_out(picture: int) -> bool:
    """Whether a training picture belongs to validation: about one in ten, by a hash of its number."""
    return int(hashlib.sha256(str(picture).encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def descriptions_of(questions: list[QuestionRow]) -> dict[int, str]:
    """ "a blue circle" for every picture whose questions tell its shape and its colour."""
    properties: dict[int, dict[str, str]] = {}
    for question, answer, picture in questions:
        words = _word(SHAPES, answer), _word(COLORS, answer)
        # "no" to a negated question ("is no red shape present?") confirms the words of the question, as "yes" does
        # else.
        if answer in ("yes", "no") and (answer == "no") == (_word(("not", "no"), question) is not None):
            words = _word(SHAPES, question), _word(COLORS, question)
        elif answer not in ("yes", "no"):
            # "what is the blue shape?" has the colour in the question.
            words = words[0] or _word(SHAPES, question), words[1] or _word(COLORS, question)
        named = {name: word for name, word in zip(("shape", "color"), words, strict=True) if word}
        properties.setdefault(picture, {}).update(named)
    complete = {picture: values for picture, values in properties.items() if len(values) == 2}
    return {picture: f"a {values['color']} {values['shape']}" for picture, values in complete.items()}


def _word(words: tuple[str, ...], text: str) -> str | None:
    return next((word for word in words if re.search(rf"\b{word}\b", text)), None)


def rows(questions: list[QuestionRow], images: Path) -> list[dict[str, Any]]:
    """One conversation per question, with the path of its picture."""
    return [_row(question, answer, images / f"{picture}.png") for question, answer, picture in questions]


def _row(question: str, answer: str, image: Path) -> dict[str, Any]:
    prompt = [{"type": "image", "text": None}, {"type": "text", "text": question}]
    reply = [{"type": "text", "text": answer}]
    return {
        "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}],
        "images": [image.as_posix()],
    }


def make_easy_vqa(output_dir: Path) -> dict[str, int]:
    """Writes all files; returns the number of rows of each. Raises UserError for a package with another sha256."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir) as scratch, zipfile.ZipFile(_download(Path(scratch))) as wheel:
        for split in ("train", "test"):
            _extract(wheel, split, output_dir / "images" / split)
        questions: dict[str, list[QuestionRow]] = {
            split: [tuple(row) for row in json.loads(wheel.read(f"easy_vqa/data/{split}/questions.json"))]
            for split in ("train", "test")
        }
    images = output_dir / "images"
    shown = descriptions_of(questions["train"])
    captions = [
        (INSTRUCTIONS[picture % len(INSTRUCTIONS)], text, picture)
        for picture, text in sorted(shown.items())
        if not is_held_out(picture)
    ]
    parts = {
        "train": rows([row for row in questions["train"] if not is_held_out(row[2])], images / "train"),
        "validation": rows([row for row in questions["train"] if is_held_out(row[2])], images / "train"),
        "test": rows(questions["test"], images / "test"),
        "captions": rows(captions, images / "train"),
    }
    for name, part in parts.items():
        write_file(output_dir / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in part))
    return {name: len(part) for name, part in parts.items()}


def _download(folder: Path) -> Path:
    (wheel,) = download([PACKAGE], folder)
    check_sha256(wheel, SHA256, PACKAGE)
    return wheel


def _extract(wheel: zipfile.ZipFile, split: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    prefix = f"easy_vqa/data/{split}/images/"
    for name in wheel.namelist():
        if name.startswith(prefix) and name.endswith(".png"):
            (folder / Path(name).name).write_bytes(wheel.read(name))


def main(arguments: list[str] | None = None) -> None:
    """The command line of scripts/make_easy_vqa.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=OUTPUT_DIR, help=f"where to write (default: {OUTPUT_DIR})")
    folder = parser.parse_args(arguments).output_dir
    for name, count in make_easy_vqa(folder).items():
        print(f"{folder / name}.jsonl: {count:,} rows")
