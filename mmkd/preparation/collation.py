"""Rows with images: what each model sees of them, which positions are visual tokens, and what cannot be right."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import ProcessorMixin

from mmkd.data.images import UnusableRow, read_row
from mmkd.errors import UserError
from mmkd.teachers.cached import images_of

from .row_names import STORED_IMAGES, RowNames
from .turns import Turns
from .vision_labels import VisionLabels

logger = logging.getLogger(__name__)

VISUAL = "visual_tokens"
"""Where `VisionCollator` puts the mask of visual tokens and the size of each image."""

TEACHER_INPUTS = "teacher_inputs"
"""Where it puts the teacher's version of the batch, made by the teacher's own processor."""

BAD_ROWS = ("unreadable_rows", "overlong_rows")
"""How many rows `on_bad_row: skip` left out, by what was wrong; in the logs, and in `VISUAL` as "skipped"."""

ROW_LENGTHS = "row_lengths"
"""How many tokens each row of a batch has, 0 for one that only keeps ranks together."""

_SKIPPED = "skipped"


@dataclass(frozen=True)
class View:
    """A micro-batch as one model sees it."""

    inputs: dict[str, Any]
    labels: Int[Tensor, "batch position"]
    visual: Bool[Tensor, "batch position"]
    images: Int[Tensor, "image 2"]
    """Row and number of visual tokens of each image, in the order of the rows."""

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> "View":
        """The student's view of a collated batch, without what no model reads.

        Rows that supervise nothing have no visual tokens either: ranks repeat rows at the end of an evaluation.
        """
        labels = batch["labels"]
        none = {"mask": torch.zeros_like(labels, dtype=torch.bool), "images": labels.new_zeros(0, 2)}
        visual = batch.get(VISUAL, none)
        left_out = ("labels", VISUAL, TEACHER_INPUTS)
        inputs = {key: value for key, value in batch.items() if key not in left_out}
        view = cls(inputs, labels, visual["mask"], visual["images"])
        return view.learnt_from(view.supervised.any(1))

    @property
    def supervised(self) -> Bool[Tensor, "batch position-1"]:
        """The positions that predict a supervised token."""
        return self.labels[:, 1:] != -100

    def learnt_from(self, rows: Bool[Tensor, "batch"]) -> "View":
        """The view in which only the chosen rows have labels and visual tokens."""
        labels = self.labels.masked_fill(~rows[:, None], -100)
        return replace(
            self, labels=labels, visual=self.visual & rows[:, None], images=self.images[rows[self.images[:, 0]]]
        )


def teacher_view(ours: View, batch: Mapping[str, Any]) -> View:
    """The teacher's view of a collated batch: the student's (`ours`), unless the teacher has a processor of its own.

    Raises UserError when the two sides are supervised on different tokens.
    """
    if TEACHER_INPUTS not in batch:
        return ours
    # Rows without labels on our side, repeated at the end of an evaluation, have none on the other.
    theirs = View.of(batch[TEACHER_INPUTS])
    theirs = theirs.learnt_from(ours.supervised.any(1))
    for row, (mine, other) in enumerate(zip(_answers(ours), _answers(theirs), strict=True)):
        if mine != other:
            raise UserError(
                f"Row {row} of a batch is supervised on {len(mine)} tokens of the student's and {len(other)} of the "
                "teacher's, or on different ones: their chat templates write an answer differently, prompts are "
                "supervised too, or max_length cuts one of the two. Set assistant_only_loss: true (or map the data to "
                "prompt and completion), give both templates that write the same answer, and raise max_length."
            )
    return theirs


def _answers(view: View) -> list[list[int]]:
    return [row[mask].tolist() for row, mask in zip(view.labels[:, 1:], view.supervised, strict=True)]


class Spare:
    """A usable row in the place of those that are not: batches keep their size, and nothing is learnt from it."""

    def __init__(self) -> None:
        self.row: Mapping[str, Any] | None = None

    def replace(self, rows: list[Any], bad: Mapping[int, str], kind: str) -> list[dict[str, Any]]:
        """The rows, the bad ones (number -> reason) replaced and marked. Raises UserError where none is usable."""
        marked = {
            number: one[_SKIPPED] for number, one in enumerate(rows) if isinstance(one, dict) and _SKIPPED in one
        }
        usable = next((one for number, one in enumerate(rows) if number not in {*bad, *marked}), None)
        self.row = self.row if usable is None else dict(usable)
        for number, reason in bad.items():
            if self.row is None:
                raise UserError(f"None of the first {len(rows)} rows can be used: {reason}")
            if number not in marked:
                logger.warning("Skipped a row: %s", reason)
        # What replaced a bad row may be bad in another way, and still stands for the first.
        return [
            {**(self.row or {}), _SKIPPED: marked.get(number, kind)} if number in bad else one
            for number, one in enumerate(rows)
        ]


class ImageReader:
    """The outermost data collator of rows with images: decodes them.

    A `companion`, a row with images, joins batches without any and teaches nothing: where models are sharded, the
    vision towers of all ranks must run together. Raises UserError for an image that is broken or missing, unless such
    rows are skipped; `names` says which row it is.
    """

    def __init__(
        self,
        collator: Callable[[list[dict[str, Any]]], Any],
        skip: bool,
        companion: Mapping[str, Any] | None = None,
        names: RowNames | None = None,
    ):
        self.collator, self.skip, self.companion, self.spare = collator, skip, companion, Spare()
        self.names = names or RowNames()

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        rows = [_read(example) for example in examples]
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
        usable = self.spare.replace(rows, bad, BAD_ROWS[0])
        if self.companion is None or any(images_of(row) for row in usable):
            return self.collator(usable)
        companion = read_row(self.companion)
        assert not isinstance(companion, UnusableRow), companion.reason
        batch = self.collator([*usable, companion])
        batch["labels"][-1] = -100
        batch[ROW_LENGTHS][-1] = 0
        return batch


def _read(example: Mapping[str, Any]) -> dict[str, Any] | UnusableRow:
    """The row with its images decoded, and as they were."""
    row = read_row(example)
    return row if isinstance(row, UnusableRow) else {**row, STORED_IMAGES: example.get("images")}


class VisionCollator:
    """trl's collator of rows with images, and what distillation must know of them: `VISUAL`, `TEACHER_INPUTS`.

    Raises UserError for videos, for more or fewer images than placeholders, and where `max_length` would cut a row
    within its images, unless such rows are skipped; `names` says which row it is.
    """

    def __init__(self, collator: VisionLabels, skip: bool = False, names: RowNames | None = None):
        self.student, self.teacher = collator, None
        self.names = names or RowNames()
        self.skip, self.spare = skip, Spare()
        # Cut here, where the loss of image tokens can be told from the loss of text.
        self.max_length, collator.max_length = collator.max_length, None
        require_image_tokens(collator.processor, "student")

    def add_teacher(self, processor: ProcessorMixin) -> None:
        """Gives the teacher its own version of every batch, if its processor makes another one."""
        if processing_facts(processor) == processing_facts(self.student.processor):
            return
        require_image_tokens(processor, "teacher")
        turns = Turns.of(processor) if self.student.assistant_only_loss else None
        self.teacher = replace(
            self.student,
            processor=processor,
            chat_template=None if turns is None else turns.template,
            turns=turns,
        )

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        for example in examples:
            _check_row(example, self.student.processor, self.names)
        sides = [self.student] if self.teacher is None else [self.student, self.teacher]
        try:
            # trl's collator writes into its examples.
            batches = [dict(side([dict(example) for example in examples])) for side in sides]
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
            return self(self.spare.replace(examples, refused, BAD_ROWS[0]))
        lost = {
            row: why for one, side in zip(batches, sides, strict=True) for row, why in self._lost(one, side, examples)
        }
        if lost and not self.skip:
            raise UserError(next(iter(lost.values())))
        examples = self.spare.replace(examples, lost, BAD_ROWS[1])
        if lost:
            return self(examples)
        batch, *teacher = (self._finished(one, side, examples) for one, side in zip(batches, sides, strict=True))
        return {**batch, TEACHER_INPUTS: teacher[0]} if teacher else batch

    def _refused(self, examples: list[dict[str, Any]]) -> dict[int, str]:
        """The rows with an image that a side's processor does not take, and why."""
        sides = {"student": self.student} | ({} if self.teacher is None else {"teacher": self.teacher})
        found: dict[int, str] = {}
        for number, example in enumerate(examples):
            for role, side in sides.items():
                reason = refusal(images_of(example), side.processor)
                if reason is not None and number not in found:
                    name = self.names.of(example)
                    found[number] = f"{name} has an image that the {role}'s processor refuses: {reason}"
        return found

    def _finished(
        self, batch: dict[str, Any], collator: VisionLabels, examples: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """A collated batch cut to `max_length`, with its `VISUAL`, in which skipped rows teach nothing."""
        processor: Any = collator.processor
        ids = batch["input_ids"]
        mask = ids == processor.image_token_id
        if self.max_length is not None and ids.shape[1] > self.max_length:
            for key, value in batch.items():
                if isinstance(value, Tensor) and value.shape[:2] == ids.shape and value.ndim == 2:
                    batch[key] = value[:, : self.max_length]
            mask = mask[:, : self.max_length]
        images = [images_of(example) for example in examples]
        sizes = [
            [row, size]
            for row, one in enumerate(images)
            for size in _sizes(mask[row], one, processor, lambda row=row: self.names.of(examples[row]))
        ]
        batch[VISUAL] = {"mask": mask, "images": torch.tensor(sizes, dtype=torch.long).reshape(-1, 2)}
        if self.skip:
            kinds = [example.get(_SKIPPED) for example in examples]
            batch["labels"][[row for row, kind in enumerate(kinds) if kind is not None]] = -100
            batch[VISUAL]["skipped"] = torch.tensor([kinds.count(kind) for kind in BAD_ROWS])
        return batch

    def _lost(
        self, batch: Mapping[str, Any], collator: VisionLabels, examples: Sequence[Mapping[str, Any]]
    ) -> list[tuple[int, str]]:
        """The rows that `max_length` would cut within their images, and what to do."""
        if self.max_length is None:
            return []
        processor: Any = collator.processor
        mask = batch["input_ids"] == processor.image_token_id
        found = []
        # The last position predicts nothing, so an image that ends there has no text after it.
        for row in mask[:, self.max_length - 1 :].any(1).nonzero()[:, 0].tolist():
            last = int(mask[row].nonzero()[-1]) + 1
            reason = (
                f"{self.names.of(examples[row])}: max_length {self.max_length} would cut it within its images, whose "
                f"{int(mask[row].sum())} tokens end at position {last}. Raise max_length above {last} plus the "
                "answer, shrink the images, filter such rows out, or set on_bad_row: skip to leave them out and "
                "count them."
            )
            found.append((row, reason))
        return found


def refusal(images: Sequence[Any], processor: Any) -> str | None:
    """Why a processor does not take one of a row's images, which can be read; None where it takes all of them."""
    image_processor: Any = getattr(processor, "image_processor", None)
    if image_processor is None:
        return None
    for number, image in enumerate(images):
        try:
            image_processor(images=[image], return_tensors="pt")
        except Exception as error:
            size = f"{image.width} x {image.height} pixels"
            return f"images[{number}], {size}: {type(error).__name__}: {error}"
    return None


def require_image_tokens(processor: Any, role: str) -> None:
    """Raises UserError for a processor that does not say which token stands for a piece of an image."""
    if getattr(processor, "image_token_id", None) is None:
        raise UserError(
            f"The {role}'s processor {type(processor).__name__} has no image_token_id, so its visual tokens cannot be "
            "found in the text. Use a model that puts its images between the tokens (LLaVA, Qwen-VL, Idefics3, "
            "SmolVLM, InternVL, Gemma 3, ...)."
        )


def processor_of_teacher(processing_class: Any, name: str) -> ProcessorMixin:
    """The teacher's processor. Raises UserError when it has none: it cannot see the images of the data."""
    if not isinstance(processing_class, ProcessorMixin):
        raise UserError(
            f"The data has images, but the teacher {name or 'given'!r} reads text only. Use a vision-language "
            "teacher, or data without images."
        )
    return processing_class


def processing_facts(processor: ProcessorMixin) -> str:
    """All that decides how rows become inputs, tokenizers aside, to tell whether two processors do the same."""
    settings = json.loads(processor.to_json_string())
    for name in ("image_processor", "tokenizer", "name_or_path", "_name_or_path"):
        settings.pop(name, None)
    image_processor: Any = getattr(processor, "image_processor", None)
    pixels = None if image_processor is None else json.loads(image_processor.to_json_string())
    return json.dumps([settings, pixels, processor.chat_template], sort_keys=True)


def check_no_videos(row: Mapping[str, Any], split: str) -> None:
    """Raises UserError for a row of a split that holds videos, which no method here learns from."""
    if {"video", "videos"} & row.keys() or "video" in (part.get("type") for part in _parts(row)):
        raise UserError(
            f"The {split} data holds videos, which mmkd does not train on yet. Map its frames to images, or leave "
            "such rows out."
        )


def _parts(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The content parts of all messages of a row."""
    found: list[Mapping[str, Any]] = []
    for column in ("messages", "prompt", "completion"):
        messages = row.get(column)
        for message in messages if isinstance(messages, list) else []:
            content = message.get("content")
            found += content if isinstance(content, list) else []
    return found


def _check_row(row: Mapping[str, Any], processor: Any, names: RowNames) -> None:
    """Raises UserError when the placeholders of a row are not as many as its images."""
    images = len(images_of(row))
    conversation = row.get("messages", row.get("prompt"))
    if isinstance(conversation, list):
        # Without parts, trl puts all images before the first question.
        structured = any(isinstance(message.get("content"), list) for message in conversation)
        placeholders = sum(part.get("type") == "image" for part in _parts(row)) if structured else images
    else:
        text = row.get("text", row.get("prompt")) or ""
        placeholders = text.count(getattr(processor, "boi_token", None) or processor.image_token)
    if placeholders != images:
        advice = "remove the surplus images" if images > placeholders else "add the missing images"
        raise UserError(
            f"{names.of(row)} has {images} images and {placeholders} placeholders for them: {advice}, or put as many "
            "parts {type: image} into its messages."
        )


def _sizes(mask: Bool[Tensor, "position"], images: list[Any], processor: Any, name: Callable[[], str]) -> list[int]:
    """How many visual tokens each image of a row has. Raises UserError where images and tokens do not match."""
    total = int(mask.sum())
    if bool(total) != bool(images):
        raise UserError(
            f"{name()} has {len(images)} images but {total} image tokens: "
            + ("its chat template drops them." if images else f"its text holds {processor.image_token!r} itself.")
        )
    edges = torch.diff(mask.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
    starts, ends = (edges == 1).nonzero()[:, 0], (edges == -1).nonzero()[:, 0]
    if len(images) <= 1:
        return [total][: len(images)]
    if len(starts) == len(images):
        return (ends - starts).tolist()
    # Images side by side, or cut into tiles: each is asked for alone.
    sizes = [_size_alone(image, processor) for image in images]
    if sum(sizes) == total:
        return sizes
    # LLaVA-OneVision cuts a lone image into tiles, and gives each of several the same number of tokens.
    assert total % len(images) == 0, f"images of {sizes} tokens make {total}"
    return [total // len(images)] * len(images)


def _size_alone(image: Any, processor: Any) -> int:
    content = [{"type": "image", "image": image}, {"type": "text", "text": "?"}]
    conversation = [{"role": "user", "content": content}]
    output = processor.apply_chat_template([conversation], tokenize=True, return_dict=True, return_tensors="pt")
    return int((output["input_ids"] == processor.image_token_id).sum())
