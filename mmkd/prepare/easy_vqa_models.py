"""Train the small models that a LLaVA student starts from on a CPU.

A CLIP tower learns shapes and colours, and two Llamas learn easy-VQA's questions and answers about descriptions in
words. Writes DATA/models/{tower,large,small} in some minutes on one core. All models are trained on the training
pictures and questions only. A folder that exists is kept.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from .easy_vqa import COLORS, OUTPUT_DIR, SHAPES
from .small_models import LanguageModelSize, captioned, complete, make_language_models, new_tower, train

SIDE, PATCH = 64, 8
# The attention of vLLM on a CPU requires heads of width 32 or more.
SIZES = {"large": LanguageModelSize(64, 2, heads=2), "small": LanguageModelSize(32, 1, heads=1)}
"""The language models: the teacher's and the students'."""


def make_tower(data: Path, folder: Path, steps: int = 1000, batch: int = 32) -> float:
    """Trains and saves the tower; returns its accuracy for shape and colour together in its last batches."""
    torch.manual_seed(0)
    tower, processor = new_tower(SIDE, PATCH, layers=3)
    pixels, captions = captioned(data, processor)
    words = [caption.split() for caption in captions]
    colors = torch.tensor([COLORS.index(caption[1]) for caption in words])
    shapes = torch.tensor([SHAPES.index(caption[2]) for caption in words])
    head = nn.Linear(64, len(COLORS) + len(SHAPES))
    right: list[float] = []

    def loss(rows: Tensor) -> Tensor:
        patches = tower(pixels[rows]).last_hidden_state[:, 1:]
        color, shape = head(torch.cat([patches.mean(1), patches.amax(1)], -1)).split([len(COLORS), len(SHAPES)], -1)
        both = (color.argmax(-1) == colors[rows]) & (shape.argmax(-1) == shapes[rows])
        right.append(both.float().mean().item())
        return nn.functional.cross_entropy(color, colors[rows]) + nn.functional.cross_entropy(shape, shapes[rows])

    train([*tower.parameters(), *head.parameters()], len(captions), steps, batch, loss)
    tower.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return sum(right[-20:]) / 20


def make_easy_vqa_models(data: Path) -> None:
    """Writes the models that are missing to DATA/models."""
    complete(data / "models" / "tower", lambda folder: make_tower(data, folder))
    make_language_models(data, SIZES)


def main(arguments: list[str] | None = None) -> None:
    """The command line of scripts/make_easy_vqa_models.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=OUTPUT_DIR)
    make_easy_vqa_models(parser.parse_args(arguments).data)
