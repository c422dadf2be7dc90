"""The heads that a student gets for the terms of its loss: inner stages, aspects, a gate, and embeddings."""

from typing import Any

import torch
from torch import nn

from mmkd.data.class_rows import ClassCollator, ClassRows
from mmkd.errors import UserError
from mmkd.models.captured_features import capturing
from mmkd.models.class_heads import EmbedHead
from mmkd.models.features import width_of
from mmkd.models.training_heads import Gate, TrainingHeads, add_training_heads, stage_head, stages_of
from mmkd.teachers.class_signals import ClassSignals

from .dho_config import DHOConfig


def prepare_heads(model: Any, args: DHOConfig, signals: ClassSignals, rows: ClassRows) -> None:
    """Gives a student the heads that its settings ask for. Raises UserError where it cannot have them."""
    if args.term_weights:
        _embed(model, args, signals)
    stages = args.stage_heads if args.distils else None
    gated = args.gated and args.distils
    if stages is None and signals.aspects is None and not gated:
        return
    # The same heads in every run and on every rank, whatever was drawn before.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        width, classes = model.feature_width, model.config.num_labels
        heads = TrainingHeads(
            None if stages is None else _stages(model, stages, rows),
            None if signals.aspects is None else nn.Linear(width, signals.aspects.shape[1]),
            Gate(classes, signals.teachers) if gated else None,
            "ce_logits" if args.objective == "single_head" else "kd_logits",
        )
    add_training_heads(model, heads)


def _embed(model: Any, args: DHOConfig, signals: ClassSignals) -> None:
    name = next(iter(args.term_weights))
    if model.config.text:
        raise UserError(
            f"{name}_weight compares images with a CLIP-like teacher's; a student of texts has none. Remove it.",
            because="meaning",
        )
    assert signals.embeddings is not None
    width = signals.embeddings.width
    if model.embed_head is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            head = EmbedHead(model.feature_width, width)
        model.embed_head = head.to(model.device, model.dtype)
        model.config.embed_width = width
    if model.config.embed_width != width:
        raise UserError(
            f"The student's embeddings have {model.config.embed_width} numbers and the teacher's {width}: it was "
            "trained with another teacher. Take that one, or a student without an embedding.",
            because="meaning",
        )


def _stages(model: Any, count: int, rows: ClassRows) -> dict[str, nn.Module]:
    """A head for each stage, by what the stage makes of the first row."""
    names = stages_of(model.backbone, count)
    batch = ClassCollator(rows.processing_class)([rows[0]])
    inputs = {name: values.to(model.device) for name, values in batch.items() if name != "labels"}
    training = model.training
    model.eval()
    with torch.no_grad(), capturing(model.backbone, names) as captured:
        model(**inputs)
        classes, out, text = model.config.num_labels, width_of(model.backbone), model.config.text
        heads = {
            name: stage_head(captured[name], name, classes, count - 1 - number, out, text)
            for number, name in enumerate(names)
        }
    model.train(training)
    return heads
