"""How a student with an adapter begins: the teacher's texts, and a prototype of each class from labelled rows."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmkd.data.class_rows import ClassCollator, ClassRows
from mmkd.data.classification import HIDDEN

from .dho_config import DHOConfig

_EACH = 64
"""Labelled rows of a class that its prototype is the mean of, at most."""


@torch.no_grad()
def begin_adapter(model: Any, text: Float[Tensor, "class width"], rows: ClassRows, args: DHOConfig) -> None:
    """Gives the text head the teacher's texts, and the prototypes the mean adapted features of labelled rows.

    Raises UserError where the texts are of another space than the student's features.
    """
    model.kd_head.take(model.backbone, text)
    shown = args.shown_labels(rows.labels, list(model.config.id2label.values()))
    collate = ClassCollator(rows.processing_class)
    model.to(args.device).eval()
    for number in range(model.config.num_labels):
        places = np.flatnonzero((shown == number) & (shown != HIDDEN))[:_EACH]
        batch = collate([rows[int(place)] for place in places])
        inputs = {name: values.to(args.device) for name, values in batch.items() if name != "labels"}
        model.ce_head.weight[number] = model.features(**inputs).mean(0)
    model.train()
