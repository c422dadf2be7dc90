"""Rows laid end to end, taken apart for the student to answer them, and laid end to end again with its answers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from mmkd.preparation.pairs import teacher_prefixes
from mmkd.teachers.batch import Batch, View

Lay = Callable[[list[dict[str, Any]]], Mapping[str, Any]]
"""Collates rows of tokens and labels end to end."""


def taken_apart(batch: Batch) -> Batch:
    """The batch with each sequence as a row of its own, padded on the right, also where rows were packed before."""
    rows = [part for row in batch.rows for part in _parts(row)]
    device, route = batch.student.labels.device, batch.student.route
    ids, labels = (
        pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=padding).to(device)
        for name, padding in (("input_ids", 0), ("labels", -100))
    )
    lengths = torch.tensor([len(row["input_ids"]) for row in rows], device=device)
    mask = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()
    if route is not None:
        # One column: each row has one teacher.
        route = route[0, lengths.cumsum(0) - lengths][:, None]
    student = View({"input_ids": ids, "attention_mask": mask}, labels, route=route)
    if _in_our_tokens(batch):
        batch = batch.with_teacher_views(lambda view: _apart(view, len(rows)))
    return replace(batch, student=student, row_lengths=lengths.cpu(), rows=rows)


def laid_again(batch: Batch, lay: Lay) -> Batch:
    """The batch of single rows with the student's side end to end, as `lay` collates it.

    So is that of teachers that read the same answers behind other prompts.
    """
    lengths = batch.student.inputs["attention_mask"].sum(1)
    if _in_our_tokens(batch):
        batch = batch.with_teacher_views(lambda view: _end_to_end(view, lay))
    return replace(batch, student=_end_to_end(batch.student, lay), row_lengths=lengths.cpu())


def _in_our_tokens(batch: Batch) -> bool:
    return all(reading.alignment is None for reading in batch.readings.values())


def _apart(view: View, rows: int) -> View:
    """The first so many sequences of a view, each as a row of its own."""
    # One row: as many as there are sequences are laid end to end.
    positions = view.inputs["position_ids"][0]
    starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(positions)]
    spans = [slice(*span) for span in pairwise(starts)][:rows]
    ids, labels = (
        pad_sequence([values[0, span] for span in spans], batch_first=True, padding_value=padding)
        for values, padding in ((view.inputs["input_ids"], 0), (view.labels, -100))
    )
    lengths = torch.tensor([span.stop - span.start for span in spans], device=ids.device)
    mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
    return View({"input_ids": ids, "attention_mask": mask}, labels)


def _end_to_end(view: View, lay: Lay) -> View:
    """A view of single rows with these end to end."""
    real, route, device = view.inputs["attention_mask"].bool(), view.route, view.labels.device
    lengths = real.sum(1)
    rows = zip(view.inputs["input_ids"].tolist(), view.labels.tolist(), lengths.tolist(), strict=True)
    laid = View.of(lay([{"input_ids": ids[:end], "labels": labels[:end]} for ids, labels, end in rows]))
    laid = laid.map(lambda tensor: tensor.to(device))
    if route is not None:
        of_tokens = route[:, 0].repeat_interleave(lengths)
        # Padding to a multiple, after the last row, is nobody's.
        route = pad(of_tokens, (0, laid.labels.shape[1] - len(of_tokens)), value=-1)[None]

    def end_to_end(tensor: Tensor) -> Tensor:
        return pad(tensor[real], (0, laid.labels.shape[1] - int(lengths.sum())))[None]

    rollout = None if view.rollout is None else view.rollout.map(end_to_end)
    return replace(laid, route=route, rollout=rollout)


def _parts(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The sequences of a row that may be packed, as rows of their own; with a teacher's tokens where it has those."""
    sides = [{"input_ids": row["input_ids"], "labels": row.get("labels", row["input_ids"])}]
    lengths: list[Sequence[int]] = [row.get("seq_lengths") or [len(row["input_ids"])]]
    for prefix in teacher_prefixes(list(row)):
        sides.append({name: row[name] for name in (f"{prefix}input_ids", f"{prefix}labels")})
        lengths.append(row.get(f"{prefix}seq_lengths") or [len(row[f"{prefix}input_ids"])])
    spans = [list(pairwise(accumulate(side, initial=0))) for side in lengths]
    for number, places in enumerate(zip(*spans, strict=True)):
        part = {
            name: values[start:end]
            for side, (start, end) in zip(sides, places, strict=True)
            for name, values in side.items()
        }
        for name, value in row.items():
            if isinstance(value, str):
                part[name] = value
            elif _of_sequences(value):
                part[name] = value[number]
        yield part


def _of_sequences(value: Any) -> bool:
    """Whether a column of a packed row says something in words about each of its sequences."""
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
