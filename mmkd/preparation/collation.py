"""The collator: rows become one `Batch`. Images are read, each side makes its view, what teachers know is added."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Self

import torch
from torch import Tensor
from transformers import ProcessorMixin

from mmkd.data.images import UnusableRow, read_row
from mmkd.errors import UserError
from mmkd.models.load import image_token_of
from mmkd.teachers.batch import Batch, Reading, View
from mmkd.teachers.cached import images_of

from .row_names import STORED_IMAGES, RowNames
from .row_views import RowView
from .served_rows import served_rows
from .teacher_prompts import needed_tokens
from .text_views import Rows, TextViews, row_lengths
from .turns import Turns
from .vision_checks import check_placeholders, image_sizes, processing_facts, refusal, require_image_tokens
from .vision_labels import VisionLabels

logger = logging.getLogger(__name__)

BAD_ROWS = ("unreadable_rows", "overlong_rows")
"""How many rows `on_bad_row: skip` left out, by what was wrong; in the logs, and in `Batch.skipped`."""

Fill = Callable[[Batch, Sequence[Mapping[str, Any]]], Batch]
"""(batch, its rows) -> the batch with more of its fields."""


@dataclass(frozen=True)
class Collator:
    """A data collator of a training.

    Args:
        views: makes what student and teacher read of rows.
        reader: decodes the images of rows that still have them as the data set stores them.
        fill: adds what a teacher knows of the batch.
        keeps_rows: whether the batch keeps its rows, for who wants to answer them in another way.
    """

    views: "TextViews | VisionViews"
    reader: "ImageReader | None" = None
    fill: Fill | None = None
    keeps_rows: bool = False

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        rows = Rows(examples) if self.reader is None else self.reader(examples)
        rows, batch = self.views(rows)
        if rows.companion:
            batch = _with_silent_companion(batch)
        if self.fill is not None:
            batch = self.fill(batch, rows.examples)
        return replace(batch, rows=rows.examples) if self.keeps_rows else batch


def _with_silent_companion(batch: Batch) -> Batch:
    labels, lengths = batch.student.labels.clone(), batch.row_lengths.clone()
    labels[-1], lengths[-1] = -100, 0
    return replace(batch.with_labels(labels), row_lengths=lengths)


def views_of(
    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]], data: tuple[Any, Any], skip: bool, names: RowNames
) -> "TextViews | VisionViews":
    """What student and teacher read by a collator, in which the rows of (train, evaluation) data are named."""
    if not isinstance(collator, VisionLabels):
        return TextViews(collator)
    names.add(data[0], "train")
    names.add(data[1], "eval")
    return VisionViews(collator, skip, names)


class StandIn:
    """A usable row in the place of those that are not: batches keep their size, and nothing is learnt from it."""

    def __init__(self) -> None:
        self.row: Mapping[str, Any] | None = None

    def replace(self, rows: Rows, bad: Mapping[int, str], kind: str) -> Rows:
        """The rows with the bad ones (number -> reason) replaced. Raises UserError where no row is usable."""
        unusable = {*bad, *rows.replaced}
        usable = next((row for number, row in enumerate(rows.examples) if number not in unusable), None)
        self.row = self.row if usable is None else dict(usable)
        if not bad:
            return rows
        for number, reason in bad.items():
            if self.row is None:
                raise UserError(f"None of the first {len(rows.examples)} rows can be used: {reason}")
            if number not in rows.replaced:
                logger.warning("Skipped a row: %s", reason)
        examples = [dict(self.row or {}) if number in bad else row for number, row in enumerate(rows.examples)]
        # What replaced a bad row may be bad in another way, and still stands for the first.
        return replace(rows, examples=examples, replaced={**dict.fromkeys(bad, kind), **rows.replaced})


class ImageReader:
    """Decodes the images of rows, in all columns that someone reads.

    A `companion`, a row with images, joins batches without any and teaches nothing: where models are sharded, the
    vision towers of all ranks must run together. Raises UserError for an image that is broken or missing, unless such
    rows are skipped; `names` says which row it is.
    """

    def __init__(
        self,
        skip: bool,
        companion: Mapping[str, Any] | None = None,
        names: RowNames | None = None,
        columns: Sequence[str] = ("images",),
    ):
        self.skip, self.companion, self.stand_in = skip, companion, StandIn()
        self.names, self.columns = names or RowNames(), columns

    @classmethod
    def keeping_towers_together(cls, train: Any, skip: bool, names: RowNames, columns: Sequence[str]) -> Self:
        """A reader with a companion out of `train`: a row with images in every column that any row has some in."""
        companion: Mapping[str, Any] | None = None
        for row in train:
            shown = sum(bool(row.get(column)) for column in columns)
            if shown > (0 if companion is None else sum(bool(companion.get(column)) for column in columns)):
                companion = row
            if shown == len(columns):
                break
        return cls(skip, companion, names, columns)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Rows:
        rows = [self._read(example) for example in examples]
        bad = {
            number: f"{self.names.of(examples[number])} has an image that cannot be read: {row.reason}"
            for number, row in enumerate(rows)
            if isinstance(row, UnusableRow)
        }
        if bad and not self.skip:
            raise UserError(
                f"{next(iter(bad.values()))}. Correct the row or remove it, or set on_bad_row: skip to leave such "
                "rows out and count them."
            )
        usable = self.stand_in.replace(Rows(rows), bad, BAD_ROWS[0])
        if self.companion is None or self._shown(usable.examples) >= self._shown([self.companion]):
            return usable
        companion = read_row(self.companion, self.columns)
        assert not isinstance(companion, UnusableRow), companion.reason
        return replace(usable, examples=[*usable.examples, companion], companion=True)

    def _shown(self, rows: Sequence[Mapping[str, Any]]) -> set[str]:
        """The columns in which some of the rows have images."""
        return {column for column in self.columns for row in rows if row.get(column)}

    def _read(self, example: Mapping[str, Any]) -> dict[str, Any] | UnusableRow:
        """The row with its images decoded, and as they were."""
        row = read_row(example, self.columns)
        return row if isinstance(row, UnusableRow) else {**row, STORED_IMAGES: example.get("images")}


class VisionViews:
    """Rows with images, read by the student's processor and, where that reads otherwise, by each teacher's too.

    A teacher with a view of its own reads the answer behind another prompt, or about other images. `max_length` is for
    the student's tokens: such a teacher reads as much of an answer as the student does.

    Raises UserError for videos, for more or fewer images than placeholders, and where `max_length` would cut a row
    within its images, unless such rows are skipped; `names` says which row it is. `served` names the
    teachers behind a server: what such a one reads also says what the server is asked with.
    """

    def __init__(
        self,
        student: VisionLabels,
        skip: bool = False,
        names: RowNames | None = None,
        teachers: Mapping[str, VisionLabels] | None = None,
        served: Collection[str] = (),
    ):
        # Cut here, where the loss of image tokens can be told from the loss of text.
        self.student, self.max_length = replace(student, max_length=None), student.max_length
        self.teachers = dict(teachers or {})
        self.names = names or RowNames()
        self.skip, self.stand_in, self.served = skip, StandIn(), served
        require_image_tokens(student.processor, "student")

    def reads_alike(self, processor: ProcessorMixin) -> bool:
        """Whether a processor makes of rows what the student's makes."""
        return processing_facts(processor) == processing_facts(self.student.processor)

    def with_teachers(
        self,
        processors: Mapping[str, ProcessorMixin],
        served: Collection[str] = (),
        teacher_views: Mapping[str, RowView] | None = None,
    ) -> Self:
        """The views with one for each teacher (by name) that reads otherwise than the student; those alike share it.

        Those read otherwise whose processor does, or that have a view in `teacher_views`. `served` names the teachers
        behind a server.
        """
        student, rewritten = replace(self.student, max_length=self.max_length), teacher_views or {}
        teachers: dict[str, VisionLabels] = {}
        for name in (*processors, *(name for name in rewritten if name not in processors)):
            processor, view = processors.get(name, student.processor), rewritten.get(name)
            if view is None and self.reads_alike(processor):
                continue
            facts = processing_facts(processor)
            alike = (
                side for side in teachers.values() if side.view == view and processing_facts(side.processor) == facts
            )
            teachers[name] = next(alike, None) or replace(self._side_of(name, processor), view=view)
        return type(self)(student, self.skip, self.names, teachers, served)

    def _side_of(self, name: str, processor: ProcessorMixin) -> VisionLabels:
        if self.reads_alike(processor):
            return self.student
        require_image_tokens(processor, f"teacher {name}".rstrip())
        turns = Turns.of(processor) if self.student.assistant_only_loss else None
        template = None if turns is None else turns.template
        return replace(self.student, processor=processor, chat_template=template, turns=turns)

    def of_teacher(self, name: str) -> VisionLabels:
        """What makes the batch of a teacher."""
        return self.teachers.get(name, self.student)

    def _sides(self) -> dict[str, VisionLabels]:
        """Who reads rows: the student, and the first of the teachers of each way to read them."""
        sides = {"student": self.student}
        for name, side in self.teachers.items():
            if not any(side is known for known in sides.values()):
                sides[f"teacher {name}".rstrip()] = side
        return sides

    def reader(self, train: Any, sharded: bool, image_columns: Collection[str] = ()) -> "ImageReader":
        """What decodes the images of rows, with those of more `image_columns`, which a teacher reads.

        Where models are sharded, a row of `train` keeps ranks together. Raises UserError when none of the first rows
        is usable.
        """
        columns = list(dict.fromkeys(("images", *image_columns)))
        reader = ImageReader(self.skip, None, self.names, columns)
        if sharded:
            reader = ImageReader.keeping_towers_together(train, self.skip, self.names, columns)
        if self.skip:
            # Finds a row to put in the place of others before the first batch, which may hold none.
            self(reader([dict(row) for row in islice(train, 8)]))
        return reader

    def __call__(self, rows: Rows) -> tuple[Rows, Batch]:
        examples = rows.examples
        sides = list(self._sides().values())
        for example in examples:
            for side in (self.student, *(side for side in sides if side.view is not None)):
                check_placeholders(example, side, self.names)
        try:
            # trl's collator writes into its examples.
            views = [View.of(side([dict(example) for example in examples])) for side in sides]
            asked = {id(self.of_teacher(name)) for name in self.served}
            views = [
                replace(view, served=served_rows(examples, view, side)) if id(side) in asked else view
                for view, side in zip(views, sides, strict=True)
            ]
        except Exception:
            # Processors have exceptions of their own for images that they do not take, and name no row.
            refused = self._refused(examples)
            if not refused:
                raise
            if not self.skip:
                raise UserError(
                    f"{next(iter(refused.values()))}. Correct the row or remove it, or set on_bad_row: skip to leave "
                    "such rows out and count them."
                ) from None
            return self(self.stand_in.replace(rows, refused, BAD_ROWS[0]))
        lost = {
            row: why
            for view, side in zip(views, sides, strict=True)
            for row, why in self._lost(view, side, examples).items()
        }
        if lost and not self.skip:
            raise UserError(next(iter(lost.values())))
        rows = self.stand_in.replace(rows, lost, BAD_ROWS[1])
        if lost:
            return self(rows)
        finished = {id(side): self._finished(view, side, rows) for view, side in zip(views, sides, strict=True)}
        student = finished[id(self.student)]
        for side in sides:
            if side.view is not None:
                finished[id(side)] = finished[id(side)].taught_as_much_as(student)
        readings = {name: Reading(finished[id(side)]) for name, side in self.teachers.items()}
        kinds = list(rows.replaced.values())
        skipped = torch.tensor([kinds.count(kind) for kind in BAD_ROWS]) if self.skip else None
        lengths = row_lengths(student, examples)
        return rows, Batch(student, lengths, readings, skipped=skipped)

    def _refused(self, examples: Sequence[Mapping[str, Any]]) -> dict[int, str]:
        """The rows with an image that a side's processor does not take, and why."""
        refused: dict[int, str] = {}
        for number, example in enumerate(examples):
            for role, side in self._sides().items():
                reason = refusal(images_of(side.seen(example)), side.processor)
                if reason is not None and number not in refused:
                    name = self.names.of(example)
                    refused[number] = f"{name} has an image that the {role}'s processor refuses: {reason}"
        return refused

    def _finished(self, view: View, side: VisionLabels, rows: Rows) -> View:
        """A view cut to `max_length` that knows its images, in which replaced rows teach nothing."""
        processor: Any = side.processor
        inputs, labels, ids = dict(view.inputs), view.labels.clone(), view.inputs["input_ids"]
        visual = ids == image_token_of(processor)
        if self.max_length is not None and side.view is None and ids.shape[1] > self.max_length:
            for name, value in inputs.items():
                if isinstance(value, Tensor) and value.shape == ids.shape:
                    inputs[name] = value[:, : self.max_length]
            labels, visual = labels[:, : self.max_length], visual[:, : self.max_length]
        sizes = [
            [row, size]
            for row, example in enumerate(rows.examples)
            for size in image_sizes(
                visual[row], images_of(side.seen(example)), processor, lambda example=example: self.names.of(example)
            )
        ]
        labels[list(rows.replaced)] = -100
        return replace(
            view,
            inputs=inputs,
            labels=labels,
            visual_tokens=visual,
            image_tokens=torch.tensor(sizes, dtype=torch.long).reshape(-1, 2),
        )

    def _too_long(self, view: View, told: RowView, examples: Sequence[Mapping[str, Any]]) -> dict[int, str]:
        """The rows that are longer than a teacher reads behind its own prompt, and what to do."""
        if told.longest is None:
            return {}
        read = view.inputs["attention_mask"].bool()
        lengths = [
            needed_tokens(labels[own].numpy(), told.rollout) for labels, own in zip(view.labels, read, strict=True)
        ]
        room = " with room for an answer of rollout_max_tokens" if told.rollout else ""
        return {
            row: f"{self.names.of(examples[row])} has {length} tokens behind the teacher's prompt{room}, and "
            f"teacher_max_length is {told.longest}. Raise it, shorten teacher_view, or set on_bad_row: skip to leave "
            "such rows out and count them."
            for row, length in enumerate(lengths)
            if length > told.longest
        }

    def _lost(self, view: View, side: VisionLabels, examples: Sequence[Mapping[str, Any]]) -> dict[int, str]:
        """The rows that `max_length` would cut within their images, and what to do."""
        if side.view is not None:
            return self._too_long(view, side.view, examples)
        if self.max_length is None:
            return {}
        processor: Any = side.processor
        visual = view.inputs["input_ids"] == image_token_of(processor)
        lost = {}
        # The last position predicts nothing, so an image that ends there has no text after it.
        for row in visual[:, self.max_length - 1 :].any(1).nonzero()[:, 0].tolist():
            last = int(visual[row].nonzero()[-1]) + 1
            lost[row] = (
                f"{self.names.of(examples[row])}: max_length {self.max_length} would cut it within its images, whose "
                f"{int(visual[row].sum())} tokens end at position {last}. Raise max_length above {last} plus the "
                "answer, shrink the images, filter such rows out, or set on_bad_row: skip to leave them out and "
                "count them."
            )
        return lost
