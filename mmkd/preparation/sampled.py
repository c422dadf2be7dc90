"""Rows that are looked at where looking at all would cost too much."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from jaxtyping import Bool, Int

from mmkd.cache.sequence_keys import segments
from mmkd.data.images import UnusableRow, read_row

from .vision_labels import VisionLabels

SAMPLED = 16
"""Rows that are looked at, at most, where looking costs: each goes through an image processor, or is downloaded."""


class SampledRow(NamedTuple):
    """The tokens of a row as training makes them, before `max_length` cuts images' rows."""

    ids: Int[np.ndarray, "token"]
    supervised: Bool[np.ndarray, "token"]


def sample_of(data: Any, collator: VisionLabels | None, prefix: str = "") -> list[SampledRow]:
    """Up to SAMPLED rows with images as this collator makes them, or of a stream those whose columns have the prefix.

    Of text that is no stream there is no need of a sample: the list is empty.
    """
    stream = not isinstance(data, Dataset)
    if collator is None and not stream:
        return []
    if stream:
        rows = list(islice(data, SAMPLED))
    else:
        rows = [data[row] for row in range(0, len(data), math.ceil(len(data) / SAMPLED))]
    if collator is None:
        return [labelled for row in rows for labelled in _labelled(row, prefix)]
    whole = replace(collator, max_length=None)
    return [collated for row in rows if (collated := _collated(row, whole)) is not None]


def _labelled(row: Mapping[str, Any], prefix: str) -> Iterator[SampledRow]:
    """A row of a stream, or what is packed into it; nothing of one that was not prepared here."""
    names = [f"{prefix}{name}" for name in ("input_ids", "labels")]
    if {*names} <= row.keys():
        ids, labels = (np.asarray(row[name]) for name in names)
        ends = np.cumsum(row.get(f"{prefix}seq_lengths", [len(ids)]))[:-1].tolist()
        for span in segments([0, *ends], len(ids)):
            yield _sampled(ids[span], labels[span])


def _collated(row: Mapping[str, Any], collator: VisionLabels) -> SampledRow | None:
    """A row with images; None for one that training would not take either."""
    example = read_row(row, collator.image_columns)
    if isinstance(example, UnusableRow):
        return None
    # Image processors say in ways of their own that an image is none for them; training says it, or skips the row.
    try:
        batch = collator([example])
    except Exception:
        return None
    present = batch["attention_mask"][0].bool()
    return _sampled(batch["input_ids"][0][present].numpy(), batch["labels"][0][present].numpy())


def _sampled(ids: Int[np.ndarray, "token"], labels: Int[np.ndarray, "token"]) -> SampledRow:
    supervised = labels != -100
    supervised[:1] = False
    return SampledRow(ids, supervised)
