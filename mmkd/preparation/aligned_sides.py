"""What a collator adds to a batch for teachers with other tokens: the same text in those, and how it aligns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool

from mmkd.teachers.batch import ONLY, Batch, Reading, Targets, View
from mmkd.teachers.cached import CachedTeacher, hashed_images, spans_of_row
from mmkd.teachers.routes import route_of, teacher_names

from .pairs import TEACHER, BatchAligner, Read, read_view, teacher_parts
from .served_rows import served_rows
from .vision_labels import VisionLabels


@dataclass(frozen=True)
class AlignedSide:
    """What a batch is to a teacher with other tokens: the same text in those, and how it aligns.

    Args:
        collator: makes the teacher's inputs and labels.
        align: finds the chunks.
        cached: the teacher's answers on disk, which take the place of its inputs.
        served: whether a server is the teacher, which is asked about pictures.
        prefix: of the columns with the teacher's tokens.
    """

    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    align: BatchAligner
    cached: CachedTeacher | None = None
    served: bool = False
    prefix: str = TEACHER

    def __call__(
        self, batch: Batch, examples: Sequence[Mapping[str, Any]], own: Bool[np.ndarray, "sequence"] | None = None
    ) -> Reading:
        """What the teacher reads of the batch. It teaches all sequences, or its `own`."""
        parts = [part for example in examples for part in teacher_parts(example, self.prefix)]
        view = View.of(self.collator(parts))
        if self.served and isinstance(self.collator, VisionLabels):
            view = replace(view, served=served_rows(examples, view, self.collator))
        if own is not None:
            view = view.learnt_from(torch.from_numpy(own)[:, None])
        teacher = read_view(view)
        # Padding of a batch without rows looks like sequences of one token.
        student = read_view(batch.student).first(len(teacher.lengths))
        if own is not None:
            student = student._replace(supervised=student.supervised & np.repeat(own, student.lengths))
        if self.cached is not None:
            targets, teacher = self._looked_up(teacher, hashed_images(self._seen(examples)))
            view = replace(_with_supervised(view, teacher.supervised), inputs={}, targets={ONLY: targets})
        return Reading(view, self.align(student, teacher))

    def _seen(self, examples: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Rows with images as the teacher reads them."""
        return [self.collator.seen(row) for row in examples] if isinstance(self.collator, VisionLabels) else examples

    def _looked_up(self, teacher: Read, images: Sequence[Sequence[str]]) -> tuple[Targets, Read]:
        """The cached answers, and the sequences without those that the teacher could not read."""
        assert self.cached is not None
        supervised, scores = teacher.supervised.copy(), []
        ends = np.cumsum(teacher.lengths).tolist()
        for number, (start, stop) in enumerate(zip([0, *ends], ends, strict=False)):
            if supervised[start:stop].any():
                answer_scores = self.cached.look_up(
                    teacher.ids[start:stop], supervised[start:stop], images[number] if len(images) == len(ends) else ()
                )
                if answer_scores is None:
                    supervised[start:stop] = False
                else:
                    scores.append(answer_scores)
        return self.cached.tensors(scores), teacher._replace(supervised=supervised)


def _with_supervised(view: View, supervised: Bool[np.ndarray, "token"]) -> View:
    """The view in which these tokens of its sequences, end to end, keep their labels."""
    labels, start = torch.full_like(view.labels, -100), 0
    for row in range(len(labels)):
        for span in spans_of_row(view.inputs, row):
            kept = torch.from_numpy(supervised[start : start + span.stop - span.start])
            labels[row, span] = view.labels[row, span].masked_fill(~kept, -100)
            start += len(kept)
    return replace(view, labels=labels)


@dataclass(frozen=True)
class AlignedSides:
    """What a collator adds to a batch for teachers with other tokens: what each, by its name, reads.

    With a `column`, each sequence is only for the teacher that it names there.
    """

    sides: Mapping[str, AlignedSide]
    column: str | None = None

    def __call__(self, batch: Batch, examples: Sequence[Mapping[str, Any]]) -> Batch:
        if self.column is None:
            # Teachers that read alike have one side between them.
            read = {id(side): side(batch, examples) for side in self.sides.values()}
            return replace(batch, readings={name: read[id(side)] for name, side in self.sides.items()})
        named = np.array([name for example in examples for name in teacher_names(example, self.column)])
        route = route_of(batch.student, examples, self.column, list(self.sides))
        readings = {name: side(batch, examples, named == name) for name, side in self.sides.items()}
        return replace(batch, student=replace(batch.student, route=route), readings=readings)
