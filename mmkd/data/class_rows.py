"""Rows of images or texts as a student reads them: prepared one by one, batched and sampled."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler

from mmkd.errors import UserError

from .classification import HIDDEN, read_cell

AUGMENTATIONS = ("none", "flip", "crop_flip")


class ClassRows(TorchDataset[dict[str, Any]]):
    """Rows with the student's inputs, `labels` (HIDDEN where not shown) and their number in `row`.

    `keep` prepares every row once and keeps it in memory, for small sets without augmentation.
    """

    def __init__(
        self,
        dataset: Dataset,
        processing_class: Any,
        labels: Int[np.ndarray, "row"] | None = None,
        *,
        name: str = "train",
        augmentation: str = "none",
        max_length: int = 256,
        keep: bool = False,
    ):
        self.dataset, self.processing_class, self.name = dataset, processing_class, name
        self.labels = np.asarray(dataset["label"] if labels is None else labels)
        self.augmentation, self.max_length, self.keep = augmentation, max_length, keep
        self.is_text = "text" in dataset.column_names
        self._kept: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        inputs = self._kept.get(row)
        if inputs is None:
            inputs = self._prepare(row)
            if self.keep:
                self._kept[row] = inputs
        return {**inputs, "labels": int(self.labels[row]), "row": row}

    def raw(self, row: int) -> Any:
        """The image (RGB) or text of a row, as a teacher reads it."""
        cell = self.dataset[row]
        return cell["text"] if self.is_text else read_cell(cell["image"], f"Row {row} of {self.name}")

    def content(self, row: int) -> bytes:
        """The bytes of a row's image or text, to recognise it."""
        cell = self.dataset[row]
        if self.is_text:
            return cell["text"].encode()
        image = cell["image"]
        if isinstance(image, Image.Image):
            return image.tobytes()
        if image["bytes"] is not None:
            return image["bytes"]
        with open(image["path"], "rb") as file:
            return file.read()

    @property
    def captions(self) -> list[str]:
        """The caption of each row. Raises UserError for rows without one."""
        if "caption" not in self.dataset.column_names:
            raise UserError(
                "The rows have no captions: name their column under `caption` of the data recipe, or call it caption."
            )
        captions = list(self.dataset["caption"])
        for row, caption in enumerate(captions):
            if not isinstance(caption, str) or not caption.strip():
                raise UserError(f"Row {row} of {self.name} has no caption. Write one, or leave the row out.")
        return captions

    def relabeled(self, labels: Int[np.ndarray, "row"]) -> "ClassRows":
        """The same rows, sharing what is kept, with other labels shown."""
        other = ClassRows(
            self.dataset,
            self.processing_class,
            labels,
            name=self.name,
            augmentation=self.augmentation,
            max_length=self.max_length,
            keep=self.keep,
        )
        other._kept = self._kept
        return other

    def _prepare(self, row: int) -> dict[str, Any]:
        if self.is_text:
            encoded = self.processing_class(self.raw(row), truncation=True, max_length=self.max_length)
            return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        image = augmented(self.raw(row), self.augmentation)
        return {"pixel_values": self.processing_class(images=image, return_tensors="pt")["pixel_values"][0]}


class ClassCollator:
    """Batches of rows, with what a teacher says of those rows where there is anything.

    `teacher_logits` are of every row of the data, and so is each of `more`, under the name it has in a batch.
    """

    def __init__(
        self,
        processing_class: Any,
        teacher_logits: Float[Tensor, "row *teacher class"] | None = None,
        more: Mapping[str, Tensor] | None = None,
    ):
        self.processing_class = processing_class
        self.said = ({} if teacher_logits is None else {"teacher_logits": teacher_logits}) | dict(more or {})

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = {"labels": torch.tensor([row["labels"] for row in rows])}
        if "pixel_values" in rows[0]:
            batch["pixel_values"] = torch.stack([row["pixel_values"] for row in rows])
        else:
            texts = [{key: row[key] for key in ("input_ids", "attention_mask")} for row in rows]
            batch |= dict(self.processing_class.pad(texts, return_tensors="pt"))
        numbers = [row["row"] for row in rows]
        return batch | {name: values[numbers] for name, values in self.said.items()}


class SemiSupervisedSampler(Sampler[int]):
    """Row numbers such that every batch of `labeled + unlabeled` has that many of each, labelled first.

    An epoch is one pass over the unlabelled rows, filled up to a whole batch; the labelled ones are dealt in shuffled
    rounds, as often as needed. With no unlabelled rows wanted, the batches are as many as they would be with them.
    """

    def __init__(
        self,
        labels: Int[np.ndarray, "row"],
        labeled_batch: int,
        unlabeled_batch: int,
        seed: int,
        supervised_only: bool = False,
    ):
        self.labeled, self.unlabeled = np.flatnonzero(labels != HIDDEN), np.flatnonzero(labels == HIDDEN)
        self.labeled_batch, self.unlabeled_batch = labeled_batch, unlabeled_batch
        self.seed, self.epoch, self.supervised_only = seed, 0, supervised_only
        passes = -(-len(self.unlabeled) // unlabeled_batch) if unlabeled_batch else 0
        self.batches = passes or -(-len(self.labeled) // labeled_batch)

    @property
    def batch_size(self) -> int:
        """Rows of one batch."""
        return self.labeled_batch + (0 if self.supervised_only else self.unlabeled_batch)

    def set_epoch(self, epoch: int) -> None:
        """Another epoch has another order; the same one the same."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.epoch])
        labeled = _rounds(self.labeled, self.batches * self.labeled_batch, random)
        wanted = 0 if self.supervised_only else self.unlabeled_batch
        unlabeled = _rounds(self.unlabeled, self.batches * wanted, random)
        for batch in range(self.batches):
            yield from labeled[batch * self.labeled_batch : (batch + 1) * self.labeled_batch]
            yield from unlabeled[batch * wanted : (batch + 1) * wanted]


def augmented(image: Image.Image, augmentation: str) -> Image.Image:
    """The image, mirrored half of the time (flip), or a random part of it of half its area or more too (crop_flip)."""
    if augmentation == "none":
        return image
    if augmentation == "crop_flip":
        share, across, down = torch.rand(3).tolist()
        side = (0.5 + share / 2) ** 0.5
        width, height = max(1, round(side * image.width)), max(1, round(side * image.height))
        left, top = round(across * (image.width - width)), round(down * (image.height - height))
        image = image.crop((left, top, left + width, top + height)).resize(image.size)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(()) < 0.5 else image


def _rounds(rows: Int[np.ndarray, "row"], count: int, random: np.random.Generator) -> Sequence[int]:
    """`count` rows: whole shuffled rounds and a part of the next."""
    if count == 0:
        return []
    rounds = [random.permutation(rows) for _ in range(-(-count // len(rows)))]
    return np.concatenate(rounds)[:count].tolist()
