"""Write captions for the pictures of easy-VQA and of Fashion-MNIST, for dual encoders of images and texts.

Of easy-VQA, "a blue circle" as its questions tell it; of Fashion-MNIST, one of some templates with the name of the
class. Writes {easy_vqa,fashion_mnist}_{train,validation,test}.parquet. Training pictures of Fashion-MNIST are those of
captions.parquet and train.parquet.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, concatenate_datasets, load_dataset
from PIL import Image

from .easy_vqa import OUTPUT_DIR as EASY_VQA
from .easy_vqa import QuestionRow, descriptions_of
from .emoji_names import write_captioned
from .fashion_clip import CAPTIONS
from .fashion_mnist import CLASSES
from .fashion_mnist import OUTPUT_DIR as FASHION_MNIST

OUTPUT_DIR = Path(".cache/mmkd/picture_captions")

MOST = {"train": 3_000, "validation": 400, "test": 1_000}
"""Pictures of each split, of each of the two."""

Captioned = tuple[Image.Image, str]


def easy_vqa_captions(data: Path, split: str) -> Iterator[Captioned]:
    """The pictures of a split whose shape and colour follow from its questions."""
    questions: list[QuestionRow] = []
    places: dict[int, str] = {}
    for line in (data / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        number = int(re.sub(r"\D", "", Path(row["images"][0]).stem))
        asked, answered = (message["content"][-1]["text"] for message in row["messages"])
        questions.append((asked, answered, number))
        places[number] = row["images"][0]
    for number, caption in sorted(descriptions_of(questions).items()):
        yield Image.open(places[number]).convert("RGB"), caption


def fashion_captions(data: Path, split: str) -> Iterator[Captioned]:
    """The pictures of a split, each with a caption of its class."""
    parts = ["captions", "train"] if split == "train" else [split]
    rows: Dataset = concatenate_datasets(
        [load_dataset("parquet", data_files=str(data / f"{part}.parquet"), split="train") for part in parts]  # pyright: ignore
    )
    for number, row in enumerate(rows.shuffle(seed=0)):
        caption = CAPTIONS[number % len(CAPTIONS)].format(CLASSES[row["label"]])  # pyright: ignore
        yield row["image"].convert("RGB"), caption  # pyright: ignore


def make_picture_captions(easy_vqa: Path, fashion_mnist: Path, output_dir: Path) -> None:
    """Writes all files."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for split, most in MOST.items():
        for name, pairs in (
            ("easy_vqa", easy_vqa_captions(easy_vqa, split)),
            ("fashion_mnist", fashion_captions(fashion_mnist, split)),
        ):
            chosen = [pair for pair, _ in zip(pairs, range(most), strict=False)]
            write_captioned(output_dir / f"{name}_{split}.parquet", chosen)


def main(arguments: list[str] | None = None) -> None:
    """The command line of scripts/make_picture_captions.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--easy_vqa", type=Path, default=EASY_VQA)
    parser.add_argument("--fashion_mnist", type=Path, default=FASHION_MNIST)
    parser.add_argument("--output_dir", type=Path, default=OUTPUT_DIR, help=f"where to write (default: {OUTPUT_DIR})")
    options = parser.parse_args(arguments)
    make_picture_captions(options.easy_vqa, options.fashion_mnist, options.output_dir)
