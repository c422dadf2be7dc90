"""Batches of pairs: images or texts with their captions, as student and teachers read them."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler

from mmkd.data.caption_source import CaptionedSplit
from mmkd.data.class_rows import augmented
from mmkd.data.picture_views import PictureView
from mmkd.data.text_pairs import TextPairSplit
from mmkd.errors import UserError
from mmkd.models.dual_encoder import DualEncoder
from mmkd.teachers.cached_encoder import CachedEncoder, CachedPairs

PairSplit = CaptionedSplit | TextPairSplit
STUDENT, TEACHERS, CAPTIONS, TEXTS, ROWS = "student", "teachers", "captions", "texts", "rows"
"""Fields of a batch: the student's inputs, those of each teacher by name, a number for each caption, the captions
themselves, and where the pairs stand in the data."""

FIRST, SECOND = "first", "second"
"""Of inputs: the images, or the first texts, and the captions."""

Key = tuple[int, int]
"""A pair and the epoch, which decides about its caption."""


@dataclass(frozen=True)
class Pair:
    """An image, or a text, and a caption of it."""

    row: int
    first: Image.Image | str
    caption: str
    key: bytes | None = None
    """What caches of embeddings find it by, where there are any."""
    view: tuple[int, PictureView] | None = None
    """Which of the views in these caches is shown."""


class PairRows(TorchDataset[Pair]):
    """The pairs of a split; of a picture with several captions another one is drawn in each epoch.

    Where a teacher is read from a cache, one of the views that it knows is drawn, too, in place of an augmentation.
    """

    def __init__(self, split: PairSplit, seed: int = 0, augmentation: str = "none", cached: CachedPairs | None = None):
        self.split, self.seed, self.augmentation, self.cached = split, seed, augmentation, cached

    @property
    def has_images(self) -> bool:
        """Whether the first of a pair is an image."""
        return isinstance(self.split, CaptionedSplit)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: int | Key) -> Pair:
        row, epoch = key if isinstance(key, tuple) else (key, None)
        first, captions = self.split[row]
        # Without an epoch, in an evaluation, it is the first caption, and the first view.
        random = None if epoch is None else np.random.default_rng([self.seed, epoch, row])
        caption = captions[0 if random is None else int(random.integers(len(captions)))]
        if self.cached is not None:
            found_by, views = self.cached.shown(first, captions, row)
            number = 0 if random is None else int(random.integers(len(views)))
            shown = first if isinstance(first, str) else views[number].show(first)
            return Pair(row, shown, caption, found_by, (number, views[number]))
        return Pair(row, first if isinstance(first, str) else augmented(first, self.augmentation), caption)

    def caption_of(self, row: int, number: int) -> str:
        """The caption of a pair that has such a `number_of`. Raises UserError where it has none."""
        caption = next((text for text in self.split.captions[row] if number_of(text) == number), None)
        if caption is None:
            raise UserError(f"Row {row} of {self.split!r:.60} has other captions on another rank.")
        return caption

    @property
    def caption_counts(self) -> tuple[int, int]:
        """The fewest and the most captions of a pair."""
        counts = [len(captions) for captions in self.split.captions]
        return min(counts), max(counts)


class PairSampler(Sampler[Key]):
    """The pairs of an epoch in an order of its own, as many as whole batches have; another epoch leaves out others."""

    def __init__(self, rows: int, batch: int, seed: int):
        self.rows, self.batch, self.seed, self.epoch = rows, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Another epoch has another order; the same one the same."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows // self.batch * self.batch

    def __iter__(self) -> Iterator[Key]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.rows)
        return ((int(row), self.epoch) for row in order[: len(self)])


class PairCollator:
    """Batches of pairs in the inputs of the student and of its teachers; those of equal processors are shared."""

    def __init__(self, student: DualEncoder, teachers: Mapping[str, DualEncoder]):
        self.teachers = tuple(teachers)
        # Each way to prepare inputs once, with the teachers that read what it makes.
        self.kinds: list[tuple[DualEncoder, list[str]]] = [(student.for_preparing(), [])]
        for name, teacher in teachers.items():
            known = next((names for encoder, names in self.kinds if teacher.prepares_as(encoder)), None)
            if known is None:
                known = []
                self.kinds.append((teacher.for_preparing(), known))
            known.append(name)

    def __call__(self, pairs: list[Pair]) -> dict[str, Any]:
        captions = [pair.caption for pair in pairs]
        made = [_inputs(encoder, pairs) for encoder, _ in self.kinds]
        shown = {name: inputs for inputs, (_, names) in zip(made, self.kinds, strict=True) for name in names}
        return {
            STUDENT: made[0],
            TEACHERS: {name: shown[name] for name in self.teachers},
            CAPTIONS: torch.tensor([number_of(caption) for caption in captions]),
            ROWS: torch.tensor([pair.row for pair in pairs]),
            TEXTS: captions,
        }


def _inputs(encoder: DualEncoder, pairs: list[Pair]) -> dict[str, dict[str, Tensor]]:
    if isinstance(encoder, CachedEncoder):
        return dict(zip((FIRST, SECOND), encoder.prepare_pairs(pairs), strict=True))
    firsts: Any = [pair.first for pair in pairs]
    prepare: Callable[..., dict[str, Tensor]] = encoder.prepare_images
    if isinstance(firsts[0], str):
        prepare = encoder.prepare_texts
    return {FIRST: prepare(firsts), SECOND: encoder.prepare_texts([pair.caption for pair in pairs])}


def number_of(text: str) -> int:
    """A number by which equal texts are recognised, on any rank."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
