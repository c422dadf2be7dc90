"""What a trainer of classes is given, checked before it exists: rows to learn and to measure, a teacher's logits."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmkd.data.class_rows import ClassRows
from mmkd.data.classification import HIDDEN
from mmkd.errors import UserError
from mmkd.teachers.class_logits import compute_class_logits
from mmkd.teachers.classifiers import ClassTeacher, check_classes

from .dho_config import DHOConfig


def training_rows(dataset: Any, processing_class: Any, args: DHOConfig, class_names: Sequence[str]) -> ClassRows:
    """The rows to learn, with the labels that are shown.

    Raises UserError where rows or what reads them are missing, and where no row is left to learn without a label.
    """
    if dataset is None or processing_class is None:
        raise UserError("DHO needs train_dataset, and the student's image processor or tokenizer as processing_class.")
    rows = _rows(dataset, processing_class, args, "train")
    _check_range(rows.labels, class_names, "train")
    shown = args.shown_labels(rows.labels, class_names)
    args.check_unlabeled(shown)
    return rows.relabeled(shown)


def evaluated_rows(
    dataset: Any, processing_class: Any, args: DHOConfig, class_names: Sequence[str], name: str
) -> ClassRows | None:
    """Rows that are measured, if there are any. Raises UserError for one without a label."""
    if dataset is None:
        return None
    rows = _rows(dataset, processing_class, args, name)
    _check_range(rows.labels, class_names, name)
    if len(rows) == 0 or (rows.labels == HIDDEN).any():
        raise UserError(f"The {name} rows are measured by their labels: there must be some, and none unknown.")
    return rows


def teacher_logits(
    teacher: ClassTeacher | Float[Tensor, "row class"] | None,
    train: ClassRows,
    args: DHOConfig,
    class_names: Sequence[str],
) -> Float[Tensor, "row class"] | None:
    """What the teacher says of every training row; None for an objective that does not ask it.

    Raises UserError for a teacher of other classes, of other rows, or whose logits are not finite.
    """
    if args.objective == "ce":
        return None
    if teacher is None:
        raise UserError(f"Objective {args.objective} needs a teacher: pass a ClassTeacher or its logits.")
    if isinstance(teacher, ClassTeacher):
        if list(teacher.class_names) != list(class_names):
            check_classes(len(teacher.class_names), class_names, "The teacher")
            raise UserError(f"The teacher's classes {list(teacher.class_names)} are not {list(class_names)}.")
        teacher = compute_class_logits(teacher, train.raw, len(train), args.teacher_batch_size)
    check_classes(teacher.shape[-1], class_names, "The teacher")
    if len(teacher) != len(train):
        raise UserError(f"There are teacher logits of {len(teacher)} rows, and {len(train)} training rows.")
    if not torch.isfinite(teacher).all():
        raise UserError("The teacher's logits hold NaN or infinity; a teacher in float16 may have overflowed.")
    return teacher


def settle_heads(model: Any, args: DHOConfig) -> None:
    """Sets what the model predicts with until that is chosen; freezes a head without a loss, on which DDP insists."""
    weights = (0.5, 0.5) if args.alpha is None else (args.alpha, args.beta)
    alpha, beta = {"dho": weights, "kd": (0.0, 1.0)}.get(args.objective, (1.0, 1.0))
    model.config.alpha, model.config.beta = alpha, beta
    model.ce_head.requires_grad_(args.objective != "kd")
    model.kd_head.requires_grad_(args.objective in ("dho", "kd"))


def _rows(dataset: Any, processing_class: Any, args: DHOConfig, name: str) -> ClassRows:
    if isinstance(dataset, ClassRows):
        return dataset
    augmentation = args.augmentation if name == "train" else "none"
    settings = {"max_length": args.max_length, "keep": args.keep_rows}
    return ClassRows(dataset, processing_class, name=name, augmentation=augmentation, **settings)


def _check_range(labels: np.ndarray, class_names: Sequence[str], name: str) -> None:
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(
            f"The labels of {name} are not one class number per row; several classes per row are not what DHO's heads "
            "(softmax) can say. Keep the rows and the column of a single class.",
            because="meaning",
        )
    outside = labels[(labels != HIDDEN) & ((labels < 0) | (labels >= len(class_names)))]
    if len(outside):
        raise UserError(
            f"{name} has the label {outside[0]}, but the student knows {len(class_names)} classes, 0 to "
            f"{len(class_names) - 1}. Give one class name per label."
        )
