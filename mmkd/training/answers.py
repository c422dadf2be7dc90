"""Answers of the student in the place of the data's: where an answer begins, and a batch with another one."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from mmkd.preparation.collation import ROW_LENGTHS, TEACHER_INPUTS, VISUAL
from mmkd.teachers.cached import BATCH_KEY

from .preparing import ROWS


class Rollout(NamedTuple):
    """What the student answers to a prompt."""

    ids: list[int]
    ended: bool
    """Whether its last token is one that ends an answer."""

    @property
    def empty(self) -> bool:
        """Whether it says nothing before it ends."""
        return len(self.ids) <= self.ended


class Placed(NamedTuple):
    """A rollout and the position of a row at which it begins."""

    start: int
    rollout: Rollout


def answer_starts(batch: Mapping[str, Any], prompt_tokens: int | None = None) -> list[int | None]:
    """Where the last answer of each row of a collated batch begins; None for a row that cannot be answered anew.

    A row whose first token is supervised has no prompt; with `prompt_tokens` its first so many tokens are one. A row
    that supervises nothing is none to learn from.
    """
    supervised = batch["labels"] != -100
    begins = supervised.clone()
    begins[:, 1:] &= ~supervised[:, :-1]
    begins[:, 0] = False
    lengths = _lengths(batch)
    starts: list[int | None] = []
    for row, places in enumerate(begins):
        # Tokens of images are never supervised, also where everything else is.
        asked = not (VISUAL in batch and supervised[row, 0])
        found = places.nonzero()
        if len(found) and asked:
            start = int(found[-1])
            # An image after the answer, in a turn that nobody answers, would lose its tokens.
            late = VISUAL in batch and bool(batch[VISUAL]["mask"][row, start:].any())
            starts.append(None if late else start)
        elif prompt_tokens is not None and supervised[row].any() and lengths[row] > prompt_tokens:
            starts.append(prompt_tokens)
        else:
            starts.append(None)
    return starts


def prompts_of(batch: Mapping[str, Any], starts: Sequence[int], pad_id: int) -> dict[str, Any]:
    """The prompts of a collated batch as generation reads them: padded on the left, with everything but labels."""
    left_out = ("labels", VISUAL, TEACHER_INPUTS, BATCH_KEY, ROW_LENGTHS, ROWS)
    inputs = {name: value for name, value in batch.items() if name not in left_out}
    inputs.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    width = max(starts)
    for name in _per_token(inputs):
        value = inputs[name]
        padded = value.new_full((len(value), width), pad_id if name == "input_ids" else 0)
        for row, start in enumerate(starts):
            padded[row, width - start :] = value[row, :start]
        inputs[name] = padded
    return inputs


def with_answers(
    batch: Mapping[str, Any],
    placed: Mapping[int, Placed],
    *,
    pad_id: int,
    multiple: int | None = None,
    learn_truncated: bool = True,
) -> dict[str, Any]:
    """The collated batch with rollouts in the place of what stood in some rows (number -> rollout) from there on.

    Only the rollout of such a row is supervised, or nothing where it is truncated and `learn_truncated` is off. A
    teacher's version of the batch gets the same tokens after its own prompts.
    """
    lengths = _lengths(batch)
    kept = [placed[row].start if row in placed else length for row, length in enumerate(lengths)]
    answers = [placed[row].rollout.ids if row in placed else [] for row in range(len(kept))]
    width = max(length + len(ids) for length, ids in zip(kept, answers, strict=True))
    width = -(-width // (multiple or 1)) * (multiple or 1)
    finished = {name: value for name, value in batch.items() if name != ROW_LENGTHS}
    padding = {"input_ids": pad_id, "labels": -100}
    for name in _per_token(batch):
        value = batch[name]
        finished[name] = value.new_full((len(value), width), padding.get(name, 0))
        for row, (length, ids) in enumerate(zip(kept, answers, strict=True)):
            finished[name][row, :length] = value[row, :length]
            if row in placed:
                end = length + len(ids)
                told = torch.tensor(ids, dtype=value.dtype, device=value.device)
                if name == "labels":
                    finished[name][row, :length] = -100
                    if placed[row].rollout.ended or learn_truncated:
                        finished[name][row, length:end] = told
                elif name in ("input_ids", "attention_mask"):
                    finished[name][row, length:end] = told if name == "input_ids" else 1
    if VISUAL in batch:
        # All images stand before the answer, so that none is added or lost.
        mask = batch[VISUAL]["mask"]
        fitted = mask.new_zeros(len(mask), width)
        common = min(width, mask.shape[1])
        fitted[:, :common] = mask[:, :common]
        finished[VISUAL] = {**batch[VISUAL], "mask": fitted}
    if TEACHER_INPUTS in batch:
        theirs = batch[TEACHER_INPUTS]
        starts = answer_starts(theirs)
        moved = {row: one._replace(start=starts[row]) for row, one in placed.items()}
        finished[TEACHER_INPUTS] = with_answers(
            theirs, moved, pad_id=pad_id, multiple=multiple, learn_truncated=learn_truncated
        )
    return finished


def _per_token(batch: Mapping[str, Any]) -> list[str]:
    """The fields that say something about each token of each row."""
    shape = batch["input_ids"].shape
    return [name for name, value in batch.items() if isinstance(value, Tensor) and value.shape == shape]


def _lengths(batch: Mapping[str, Any]) -> list[int]:
    """The real tokens of each row, which padding follows."""
    mask: Int[Tensor, "batch position"] = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    assert (mask[:, 1:] <= mask[:, :-1]).all(), "batches to train on are padded on the right"
    return mask.sum(1).tolist()
