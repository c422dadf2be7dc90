"""Rows that stand twice in a batch: once with the data's answer, and once for the student's own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from mmkd.teachers.batch import Batch, View

from .answers import Placed
from .laid_rows import taken_apart


def with_rows_again(
    batch: Batch, placed: Mapping[int, Placed], collate: Callable[[Sequence[Mapping[str, Any]]], Batch] | None
) -> tuple[Batch, dict[int, Placed]]:
    """The batch of single rows in which those with a rollout stand again at its end, and the rollouts by these rows.

    `collate` makes a batch of rows; None where they are laid end to end afterwards.
    """
    chosen, width = sorted(placed), len(batch.rows)
    rows = [*batch.rows, *(batch.rows[row] for row in chosen)]
    view = batch.student
    if collate is None:
        again = taken_apart(replace(batch, rows=rows, student=replace(view, route=None), readings={}))
        route = None if view.route is None else torch.cat([view.route, view.route[chosen]])
        again = replace(again, student=replace(again.student, route=route), readings=batch.readings)
        if all(reading.alignment is None for reading in batch.readings.values()):
            again = again.with_teacher_views(lambda view: _again(view, chosen))
    else:
        again = collate(rows).to(view.labels.device)
    # A row in the place of a bad one, or one that keeps ranks together, still teaches nothing.
    taught = torch.cat([view.supervised.any(1), view.supervised.new_ones(len(chosen))])
    real = torch.cat([batch.row_lengths.clamp(max=1), batch.row_lengths.new_ones(len(chosen))])
    student = again.student.learnt_from(taught[:, None])
    lengths = real * student.labels.shape[1]
    again = replace(again, student=student, row_lengths=lengths, skipped=batch.skipped)
    return again, {width + number: placed[row] for number, row in enumerate(chosen)}


def _again(view: View, chosen: Sequence[int]) -> View:
    """A view of rows of text in which some stand again at the end."""
    inputs = {name: torch.cat([value, value[chosen]]) for name, value in view.inputs.items()}
    return replace(view, inputs=inputs, labels=torch.cat([view.labels, view.labels[chosen]]))
