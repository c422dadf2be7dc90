"""A CLIP-like teacher's features of every training row, of its classes and captions, on disk beside its logits."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

from mmkd.errors import UserError

from .class_logits import has_rows, read_rows, write_rows
from .class_signals import Embeddings
from .classifiers import ClassTeacher, TipAdapterTeacher, ZeroShotTeacher

STEM = "class_embeddings"


def embedding_teacher(teacher: ClassTeacher) -> ZeroShotTeacher:
    """The CLIP-like model behind a teacher. Raises UserError for a teacher of another kind."""
    if isinstance(teacher, TipAdapterTeacher):
        return teacher.zero_shot
    if not isinstance(teacher, ZeroShotTeacher):
        raise UserError(
            f"A teacher of kind {teacher.kind} has no features of images and texts in one space. Take teacher_kind "
            "zero_shot or tip_adapter.",
            because="meaning",
        )
    return teacher


def compute_embeddings(
    teacher: ClassTeacher,
    read: Callable[[int], Any],
    rows: int,
    captions: Sequence[str] | None = None,
    batch_size: int = 64,
) -> Embeddings:
    """The teacher's features of rows 0 to `rows`, each read by its number, and of their captions, in batches.

    Raises UserError for a teacher without features of images and texts in one space.
    """
    zero_shot = embedding_teacher(teacher)
    images, texts = [], []
    for first in range(0, rows, batch_size):
        numbers = range(first, min(first + batch_size, rows))
        images.append(zero_shot.embedder.image_features([read(row) for row in numbers]).cpu())
        if captions is not None:
            texts.append(zero_shot.embedder.text_features([captions[row] for row in numbers]).cpu())
    return Embeddings(
        torch.cat(images), normalize(zero_shot.text_weights, dim=-1), None if captions is None else torch.cat(texts)
    )


def has_embeddings(folder: str | Path) -> bool:
    """Whether a folder holds complete embeddings."""
    return has_rows(folder, STEM)


def write_embeddings(folder: str | Path, embeddings: Embeddings, identity: dict[str, Any]) -> None:
    """Writes them, and what made them."""
    tensors = {"images": embeddings.images, "text": embeddings.text, "captions": embeddings.captions}
    write_rows(folder, STEM, {name: values for name, values in tensors.items() if values is not None}, identity)


def read_embeddings(folder: str | Path, expected: dict[str, Any]) -> Embeddings:
    """Those of a folder. Raises UserError when they are damaged, or `expected` differs from what made them."""
    tensors, _ = read_rows(folder, STEM, expected, "embeddings")
    return Embeddings(tensors["images"], tensors["text"], tensors.get("captions"))
