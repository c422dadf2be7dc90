"""Answers of the student in the place of the data's: where an answer begins, and a batch with another one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from mmkd.teachers.batch import Batch, RolloutTokens, View


class Rollout(NamedTuple):
    """What the student answers to a prompt."""

    ids: list[int]
    ended: bool
    """Whether its last token is one that ends an answer."""
    log_probs: list[float] | None = None
    """Of its tokens, as in `RolloutTokens`."""
    replaced: list[bool] | None = None
    """Which of its tokens a teacher has put in the place of the student's, where one could."""

    @property
    def empty(self) -> bool:
        """Whether it says nothing before it ends."""
        return len(self.ids) <= self.ended


class Placed(NamedTuple):
    """A rollout and the position of a row at which it begins."""

    start: int
    rollout: Rollout


def answer_starts(view: View, prompt_tokens: int | None = None) -> list[int | None]:
    """Where the last answer of each row of a collated batch begins; None for a row that cannot be answered anew.

    A row whose first token is supervised has no prompt; with `prompt_tokens` its first so many tokens are one. A row
    that supervises nothing is none to learn from.
    """
    supervised, visual = view.labels != -100, view.visual_tokens
    begins = supervised.clone()
    begins[:, 1:] &= ~supervised[:, :-1]
    begins[:, 0] = False
    lengths = _lengths(view)
    starts: list[int | None] = []
    for row, answers in enumerate(begins):
        # Tokens of images are never supervised, also where everything else is.
        asked = visual is None or not supervised[row, 0]
        places = answers.nonzero()
        if len(places) and asked:
            start = int(places[-1])
            # An image after the answer, in a turn that nobody answers, would lose its tokens.
            late = visual is not None and bool(visual[row, start:].any())
            starts.append(None if late else start)
        elif prompt_tokens is not None and supervised[row].any() and lengths[row] > prompt_tokens:
            starts.append(prompt_tokens)
        else:
            starts.append(None)
    return starts


def prompts_of(view: View, starts: Sequence[int], pad_id: int) -> dict[str, Any]:
    """The prompts of a collated batch as generation reads them: padded on the left, with everything but labels."""
    inputs = dict(view.inputs)
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    width = max(starts)
    for name in _per_token(inputs):
        value = inputs[name]
        padded = value.new_full((len(value), width), pad_id if name == "input_ids" else 0)
        for row, start in enumerate(starts):
            padded[row, width - start :] = value[row, :start]
        inputs[name] = padded
    return inputs


def with_answers(
    batch: Batch,
    placed: Mapping[int, Placed],
    *,
    pad_id: int,
    multiple: int | None = None,
    learnt: Callable[[Rollout], int] = lambda rollout: len(rollout.ids),
) -> Batch:
    """The collated batch with rollouts in the place of what stood in some rows (number -> rollout) from there on.

    Only the rollout of such a row is supervised, and of it the first so many tokens as `learnt` says. A teacher's
    version of the batch gets the same tokens after its own prompts; one in other tokens stays as it is.
    """

    def answered(view: View) -> View:
        moved = {
            row: placing._replace(start=same_place(batch.student, view, row, placing.start))
            for row, placing in placed.items()
        }
        return _answered(view, moved, pad_id, multiple, learnt)

    student = _answered(batch.student, placed, pad_id, multiple, learnt)
    lengths = batch.row_lengths.clamp(max=1) * student.labels.shape[1]
    in_our_tokens = all(reading.alignment is None for reading in batch.readings.values())
    batch = batch.with_teacher_views(answered) if in_our_tokens else batch
    return replace(batch, student=student, row_lengths=lengths)


def same_place(student: View, view: View, row: int, start: int) -> int:
    """Where the answer that begins there in a row of the student's begins in a view with the same answers."""
    before = int((student.labels[row, 1:start] != -100).sum())
    return int((view.labels[row, 1:] != -100).nonzero()[before, 0]) + 1


def _answered(
    view: View,
    placed: Mapping[int, Placed],
    pad_id: int,
    multiple: int | None,
    learnt: Callable[[Rollout], int],
) -> View:
    lengths = _lengths(view)
    kept = [placed[row].start if row in placed else length for row, length in enumerate(lengths)]
    answers = [placed[row].rollout.ids if row in placed else [] for row in range(len(kept))]
    width = max(length + len(ids) for length, ids in zip(kept, answers, strict=True))
    width = -(-width // (multiple or 1)) * (multiple or 1)
    fields: dict[str, Any] = {**view.inputs, "labels": view.labels}
    padding = {"input_ids": pad_id, "labels": -100}
    for name in _per_token(fields):
        value = fields[name]
        fields[name] = value.new_full((len(value), width), padding.get(name, 0))
        for row, (length, ids) in enumerate(zip(kept, answers, strict=True)):
            fields[name][row, :length] = value[row, :length]
            if row in placed:
                end = length + len(ids)
                answer = torch.tensor(ids, dtype=value.dtype, device=value.device)
                if name == "labels":
                    fields[name][row, :length] = -100
                    count = learnt(placed[row].rollout)
                    fields[name][row, length : length + count] = answer[:count]
                elif name in ("input_ids", "attention_mask"):
                    fields[name][row, length:end] = answer if name == "input_ids" else 1
    visual = view.visual_tokens
    if visual is not None:
        # All images stand before the answer, so that none is added or lost.
        fitted = visual.new_zeros(len(visual), width)
        common = min(width, visual.shape[1])
        fitted[:, :common] = visual[:, :common]
        visual = fitted
    labels = fields.pop("labels")
    begins = {row: kept[row] for row in placed}
    rollout = _tokens_of(labels, begins, {row: placing.rollout for row, placing in placed.items()})
    return replace(view, inputs=fields, labels=labels, visual_tokens=visual, rollout=rollout)


def _tokens_of(
    labels: Int[Tensor, "batch position"], begins: Mapping[int, int], rollouts: Mapping[int, Rollout]
) -> RolloutTokens:
    """What is known of the rollouts of some rows, which begin at these positions."""
    own = torch.zeros_like(labels, dtype=torch.bool)
    sampled_elsewhere = all(rollout.log_probs is not None for rollout in rollouts.values())
    log_probs = own.float() if sampled_elsewhere else None
    for row, rollout in rollouts.items():
        places = slice(begins[row], begins[row] + len(rollout.ids))
        own[row, places] = True
        if log_probs is not None:
            log_probs[row, places] = own.new_tensor(rollout.log_probs, dtype=torch.float)
        if rollout.replaced is not None:
            own[row, places] = ~own.new_tensor(rollout.replaced)
    return RolloutTokens(own, log_probs)


def _per_token(fields: Mapping[str, Any]) -> list[str]:
    """The fields that say something about each token of each row."""
    shape = fields["input_ids"].shape
    return [name for name, value in fields.items() if isinstance(value, Tensor) and value.shape == shape]


def _lengths(view: View) -> list[int]:
    """The real tokens of each row, which padding follows."""
    inputs = view.inputs
    mask: Int[Tensor, "batch position"] = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    assert (mask[:, 1:] <= mask[:, :-1]).all(), "batches to train on are padded on the right"
    return mask.sum(1).tolist()
