"""Train the small models that the teacher and the students of Fashion VQA start from, on a CPU.

A CLIP tower and one with larger patches learn what is where in the pictures, and two Llamas learn the
questions and answers about descriptions in words. Writes DATA/models/{tower,coarse_tower,large,small} in some minutes
on one core. All models are trained on the training pictures and questions only. A folder that exists is kept.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from .fashion_vqa import NAMES, NOTHING, OUTPUT_DIR, PLACES, SIDE, scene_of
from .small_models import LanguageModelSize, captioned, complete, make_language_models, new_tower, train

TOWERS = {"tower": (14, 2, 1000), "coarse_tower": (28, 1, 100)}
"""Side of a patch, layers and training steps of the towers."""
SIZES = {
    "large": LanguageModelSize(64, 3, heads=4, steps=1500, batch=32, answers=1.0),
    "small": LanguageModelSize(48, 2, heads=4, steps=1500, batch=32, answers=1.0),
}
"""The language models: the teacher's and the students'. Their heads are too narrow for vLLM on a CPU."""


def make_tower(data: Path, folder: Path, patch: int, layers: int, steps: int, batch: int = 32) -> float:
    """Trains and saves a tower; returns its accuracy for the things in its last batches."""
    torch.manual_seed(0)
    tower, processor = new_tower(2 * SIDE, patch, layers)
    pixels, captions = captioned(data, processor)
    classes = (*NAMES, NOTHING)
    things = torch.tensor([[classes.index(name) for name in scene_of(caption)] for caption in captions])
    head = nn.Linear(64, len(classes))
    right: list[float] = []

    def loss(rows: Tensor) -> Tensor:
        patches = tower(pixels[rows]).last_hidden_state[:, 1:]
        half = SIDE // patch
        # The patches of each of the four places, which lie in two rows of two.
        cells = (
            patches.view(len(rows), 2, half, 2, half, -1).transpose(2, 3).reshape(len(rows), len(PLACES), half**2, -1)
        )
        logits = head(torch.cat([cells.mean(2), cells.amax(2)], -1))
        there = things[rows] != classes.index(NOTHING)
        right.append((logits.argmax(-1) == things[rows])[there].float().mean().item())
        return nn.functional.cross_entropy(logits.flatten(0, 1), things[rows].flatten())

    train([*tower.parameters(), *head.parameters()], len(captions), steps, batch, loss)
    tower.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return sum(right[-20:]) / 20


def make_fashion_vqa_models(data: Path) -> None:
    """Writes the models that are missing to DATA/models."""
    for name, (patch, layers, steps) in TOWERS.items():
        complete(
            data / "models" / name,
            lambda folder, patch=patch, layers=layers, steps=steps: make_tower(data, folder, patch, layers, steps),
        )
    make_language_models(data, SIZES)


def main(arguments: list[str] | None = None) -> None:
    """The command line of scripts/make_fashion_vqa_models.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=OUTPUT_DIR)
    make_fashion_vqa_models(parser.parse_args(arguments).data)
