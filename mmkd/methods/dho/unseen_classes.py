"""Classes that training never sees: their rows taken out of the data, and recognised through texts after it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset
from jaxtyping import Float, Int
from torch import Tensor
from transformers.utils import logging

from mmkd.data.class_rows import ClassRows
from mmkd.data.classification import ClassificationData
from mmkd.errors import UserError, nearest
from mmkd.losses.retrieval import ClassAccuracy

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class UnseenRows:
    """Measured rows of classes that training never sees, labelled by the place of their class in `class_names`."""

    rows: Dataset
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class UnseenClasses:
    """Measured rows of classes that training never sees, and what a teacher's texts of these classes look like."""

    rows: Dataset | ClassRows
    text: Float[Tensor, "class width"]


def split_classes(data: ClassificationData, unseen: Sequence[str]) -> tuple[ClassificationData, UnseenRows]:
    """The data without the classes `unseen`, and the measured rows of these: those of test, else of validation.

    Raises UserError for names that are no classes, for fewer than two classes on either side, and where no row of the
    unseen ones is measured.
    """
    names = data.class_names
    for name in unseen:
        if name not in names:
            raise UserError(f"unseen_classes has {name!r}, which is no class; did you mean {nearest(name, names)!r}?")
    kept = tuple(name for name in names if name not in unseen)
    apart = tuple(name for name in names if name in unseen)
    if len(kept) < 2 or len(apart) < 2:
        raise UserError(
            f"unseen_classes leaves {len(kept)} classes to train on and {len(apart)} to recognise without having been "
            "seen: both must be two or more.",
            because="meaning",
        )
    source = data.validation if data.test is None else data.test
    measured = None if source is None else _of_classes(source, names, apart)
    if measured is None or len(measured) == 0:
        raise UserError(
            "There is no test or validation row of unseen_classes to measure them by. Give the data a test split.",
            because="meaning",
        )
    parts = {
        name: None if rows is None else _of_classes(rows, names, kept)
        for name, rows in (("train", data.train), ("validation", data.validation), ("test", data.test))
    }
    assert parts["train"] is not None
    left = len(data.train) - len(parts["train"])
    logger.warning("unseen_classes: %d training rows of %s are left out.", left, ", ".join(apart))
    if data.unlabeled is not None:
        logger.warning("unseen_classes: rows of the unlabeled split stay, as nobody knows their classes.")
    known: Any = {**parts, "class_names": kept}
    return replace(data, **known), UnseenRows(measured, apart)


def mean_class_accuracy(logits: Float[Tensor, "row class"], labels: Int[Tensor, "row"]) -> float:
    """The mean over classes, of those that have rows, of the share of their rows that are classified rightly."""
    return ClassAccuracy(logits.argmax(-1) == labels, labels).mean_per_class


def _of_classes(rows: Dataset, names: Sequence[str], kept: Sequence[str]) -> Dataset:
    """The rows of some classes, labelled by their place among them."""
    places = {names.index(name): place for place, name in enumerate(kept)}
    labels = np.asarray(rows.with_format("numpy")["label"])
    chosen = rows.select(np.flatnonzero(np.isin(labels, list(places))))
    column = [places[int(label)] for label in labels if int(label) in places]
    return chosen.remove_columns("label").add_column("label", column)  # pyright: ignore[reportCallIssue]
