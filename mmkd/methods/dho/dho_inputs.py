"""What a trainer of classes is given, checked before it exists: rows to learn and to measure, a teacher's logits."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmkd.data.class_rows import ClassRows
from mmkd.data.classification import HIDDEN
from mmkd.errors import UserError
from mmkd.teachers.class_embeddings import compute_embeddings
from mmkd.teachers.class_logits import compute_class_logits
from mmkd.teachers.class_signals import ClassSignals, check_texts
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


def class_signals(
    teacher: ClassTeacher | Float[Tensor, "row *teacher class"] | ClassSignals | None,
    train: ClassRows,
    args: DHOConfig,
    class_names: Sequence[str],
) -> ClassSignals:
    """What teachers say of every training row, as far as the settings ask for it.

    Raises UserError for a teacher of other classes, of other rows, or whose logits are not finite, and where something
    that the loss is about is missing.
    """
    if isinstance(teacher, ClassTeacher):
        signals = _asked(teacher, train, args, class_names)
    else:
        signals = teacher if isinstance(teacher, ClassSignals) else ClassSignals(teacher)
    if not args.distils:
        signals = replace(signals, logits=None)
    elif signals.logits is None:
        raise UserError(f"Objective {args.objective} needs a teacher: pass a ClassTeacher or its logits.")
    if signals.logits is not None:
        check_classes(signals.logits.shape[-1], class_names, "The teacher")
        if not torch.isfinite(signals.logits).all():
            raise UserError("The teacher's logits hold NaN or infinity; a teacher in float16 may have overflowed.")
    _check_several(signals, args)
    _check_terms(signals, args, class_names)
    embedded = signals.embeddings
    parts = {"logits": signals.logits, "aspects": signals.aspects}
    parts |= {} if embedded is None else {"image features": embedded.images, "captions": embedded.captions}
    for name, values in parts.items():
        if values is not None and len(values) != len(train):
            raise UserError(f"There are teacher {name} of {len(values)} rows, and {len(train)} training rows.")
    return signals


def _asked(teacher: ClassTeacher, train: ClassRows, args: DHOConfig, class_names: Sequence[str]) -> ClassSignals:
    if list(teacher.class_names) != list(class_names):
        check_classes(len(teacher.class_names), class_names, "The teacher")
        raise UserError(f"The teacher's classes {list(teacher.class_names)} are not {list(class_names)}.")
    logits, embeddings = None, None
    if args.distils:
        logits = compute_class_logits(teacher, train.raw, len(train), args.teacher_batch_size)
    if args.term_weights:
        captions = train.captions if "caption" in args.term_weights else None
        embeddings = compute_embeddings(teacher, train.raw, len(train), captions, args.teacher_batch_size)
    return ClassSignals(logits, embeddings)


def _check_several(signals: ClassSignals, args: DHOConfig) -> None:
    if not args.gated or not args.distils:
        return
    if signals.teachers < 2:
        raise UserError(
            f"mixing: {args.mixing} chooses among several teachers, and there is one. Name others in `teachers`."
        )
    if args.gate_top_k > signals.teachers:
        raise UserError(f"gate_top_k is {args.gate_top_k}, and there are {signals.teachers} teachers: lower it.")


def _check_terms(signals: ClassSignals, args: DHOConfig, class_names: Sequence[str]) -> None:
    """Raises UserError where a term lacks what it compares, or cannot tell anything apart."""
    weights, embedded = args.term_weights, signals.embeddings
    if args.aspects is not None and signals.aspects is None:
        raise UserError("aspects are learnt from answers, and there are none: pass ClassSignals(aspects=...).")
    if not weights:
        return
    name = next(iter(weights))
    if embedded is None:
        raise UserError(
            f"{name}_weight compares the student with a CLIP-like teacher's features, and there are none: take "
            "teacher_kind zero_shot or tip_adapter.",
            because="meaning",
        )
    if len(embedded.text) != len(class_names):
        raise UserError(f"The teacher has texts of {len(embedded.text)} classes, the student {len(class_names)}.")
    for what in (embedded.images, embedded.text):
        if not torch.isfinite(what).all():
            raise UserError("The teacher's features hold NaN or infinity; a teacher in float16 may have overflowed.")
    if weights.keys() & {"text_ce", "vl_align"} or args.unseen_classes is not None:
        check_texts(embedded.text, tuple(class_names))
    if "caption" in weights and embedded.captions is None:
        raise UserError(
            "caption_weight compares images with captions, and the rows have none: name their column under `caption` "
            "of the data recipe."
        )
    if "caption" in weights and embedded.captions is not None and len(embedded.captions.unique(dim=0)) < 2:
        raise UserError("All rows have the same caption, which tells no image from another. Remove caption_weight.")


def measured_rows(dataset: Any, processing_class: Any, args: DHOConfig) -> ClassRows:
    """Rows of classes that are not the student's."""
    return _rows(dataset, processing_class, args, "unseen")


def settle_heads(model: Any, args: DHOConfig) -> None:
    """Sets what the model predicts with until that is chosen; freezes a head without a loss, on which DDP insists."""
    weights = (0.5, 0.5) if args.alpha is None else (args.alpha, args.beta)
    alpha, beta = {"dho": weights, "kd": (0.0, 1.0)}.get(args.objective, (1.0, 1.0))
    model.config.alpha, model.config.beta = alpha, beta
    if model.adapter is not None:
        model.backbone.requires_grad_(False)
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
