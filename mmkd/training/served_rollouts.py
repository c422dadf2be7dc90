"""What rows with images need where a server is the teacher: their names in complaints, and rollouts in messages."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from mmkd.errors import UserError
from mmkd.preparation.collation import TextViews, VisionViews
from mmkd.preparation.row_names import RowNames
from mmkd.preparation.served_rows import messages_of
from mmkd.preparation.vision_labels import VisionLabels
from mmkd.teachers.batch import Batch, View
from mmkd.teachers.server import RefusedRow
from mmkd.teachers.several import served_parts

from .answer_text import answered, said
from .answers import Placed


@contextmanager
def naming_rows(names: RowNames) -> Iterator[None]:
    """Names a row with images that a server refuses in here; of other rows, a batch knows the tokens only."""
    try:
        yield
    except RefusedRow as refused:
        if refused.key is None:
            raise
        raise UserError(f"{names.of_key(refused.key)}: the teacher's server refused it. {refused.reason}") from refused


def as_served(
    batch: Batch, placed: Mapping[int, Placed], teacher: Any, tokenizer: Any, views: TextViews | VisionViews
) -> Batch:
    """The batch with its rollouts (row -> rollout) in what servers are asked with.

    A server may make other tokens of a rollout's text: of such a rollout nothing is learnt from the first token on
    that differs, and the batch counts it. A batch that no server is asked about in the student's tokens stays as it
    is. `tokenizer` is the student's, `views` are what batches are made by.
    """
    if not is_served(batch):
        return batch
    assert isinstance(views, VisionViews)
    placed = dict(sorted(placed.items()))
    batch = _told(batch, placed, tokenizer, views)
    read = _tokens_read(batch, placed, teacher)
    cut = {row: most for row, most in read.items() if most < int((batch.student.labels[row] != -100).sum())}
    shortened = batch.with_teacher_views(lambda view: _first_tokens(view, cut)) if cut else batch
    return replace(shortened, student=_first_tokens(batch.student, cut), retokenised=len(cut))


def is_served(batch: Batch) -> bool:
    """Whether a server is asked about the batch's rows with images, if there are any, in the student's tokens."""
    theirs = [reading.view for reading in batch.readings.values() if reading.alignment is None]
    return any(view.served is not None for view in (batch.student, *theirs))


def _told(batch: Batch, placed: Mapping[int, Placed], tokenizer: Any, views: VisionViews) -> Batch:
    """The batch in which servers are asked about the rollouts (row -> rollout)."""
    rows: dict[int, Any] = {}
    for row, placing in placed.items():
        text, _ = said(tokenizer, batch["input_ids"][row].tolist(), placing)
        rows[row] = answered(batch.rows[row], text)

    def told(view: View, side: VisionLabels) -> View:
        if view.served is None:
            return view
        served = [
            replace(row, messages=messages_of(side.seen(rows[number]))) if row is not None and number in rows else row
            for number, row in enumerate(view.served)
        ]
        return replace(view, served=served)

    # Teachers that share a view are one side.
    sides = {id(reading.view): views.of_teacher(name) for name, reading in batch.readings.items()}
    batch = batch.with_teacher_views(lambda view: told(view, sides[id(view)]))
    return replace(batch, student=told(batch.student, views.student))


def _tokens_read(batch: Batch, placed: Mapping[int, Placed], teacher: Any) -> dict[int, int]:
    """How many tokens of its answer all servers read as they are, for each row that one of them may read otherwise."""
    labels = batch.student.labels
    rows = torch.zeros(len(labels), 1, dtype=torch.bool, device=labels.device)
    rows[list(placed)] = True
    least: dict[int, int] = {}
    for name, part in served_parts(teacher).items():
        view = batch.teacher_view(name).learnt_from(rows)
        read = part.read_alike(view)
        if read is None:
            continue
        for row in placed:
            count = int((view.labels[row, : read[row]] != -100).sum())
            least[row] = min(count, least.get(row, count))
    return least


def _first_tokens(view: View, counts: Mapping[int, int]) -> View:
    """The view in which only so many of the supervised tokens of some rows are, from the first one on."""
    labels = view.labels.clone()
    for row, count in counts.items():
        labels[row, (labels[row] != -100).nonzero()[count:, 0]] = -100
    return replace(view, labels=labels)
