"""The sequences a teacher is asked about: exactly those that training with the same recipe sees."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from jaxtyping import Bool, Int
from torch import Tensor

from mmkd.cache.sequence_keys import image_hash, sequence_key
from mmkd.data.image_columns import image_column, second_image_column
from mmkd.data.images import UnusableRow as UnusableRow
from mmkd.data.images import read_row
from mmkd.data.layouts import canonical
from mmkd.data.teacher_view import TeacherView
from mmkd.errors import UserError
from mmkd.models.load import image_token_of, tokenizer_of
from mmkd.preparation.checks import check_training_data
from mmkd.preparation.pairs import TEACHER
from mmkd.preparation.prepared_rows import PreparedRows
from mmkd.preparation.prompt_rows import with_open_answers
from mmkd.preparation.row_names import STORED_IMAGES
from mmkd.preparation.row_views import RowView
from mmkd.preparation.served_rows import served_rows
from mmkd.preparation.template import TemplateReport
from mmkd.preparation.vision_checks import refusal
from mmkd.preparation.vision_labels import VisionLabels
from mmkd.teachers.cached import images_of
from mmkd.teachers.vllm_rows import ServedRow
from mmkd.training.config import DistillationConfig
from mmkd.training.preparing import preparation_of, sequences_of

# Rows with images whose tokens are counted for the order in which a cache stores ids; reading all would cost too much.
_COUNTED_IMAGES = 64


@dataclass(frozen=True)
class TokenSequence:
    """One sequence: token t is to be judged where `supervised[t]`, given those before it and the images."""

    ids: Int[np.ndarray, "token"]
    supervised: Bool[np.ndarray, "token"]
    images: tuple[str, ...] = ()
    """Hashes of the images."""
    image_tokens: int = 0
    read: Callable[[], Mapping[str, Any]] | None = None
    """Reads the row itself where there are images: decoded, all those of a shard would not fit into memory."""
    collator: VisionLabels | None = None
    """What made the tokens of a row with images."""

    @property
    def example(self) -> Mapping[str, Any]:
        """The row itself, its images decoded anew."""
        assert self.read is not None, "a row of tokens only"
        return self.read()

    @property
    def served(self) -> ServedRow | None:
        """What a server is asked with about a row with images."""
        if not self.images:
            return None
        assert self.collator is not None
        ids = torch.from_numpy(self.ids)[None]
        return served_rows([self.example], {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, self.collator)[
            0
        ]

    @property
    def key(self) -> bytes:
        return sequence_key(self.ids, self.supervised, self.images)


class Sequences:
    """The sequences of one split that have a supervised token, each once, in the order of the data.

    `prefix` begins the names of the columns of the side that reads them.
    """

    def __init__(self, dataset: Dataset, prefix: str = ""):
        seen: set[bytes] = set()
        spans: list[tuple[int, int, int]] = []
        self.counts = np.zeros(0, dtype=np.int64)
        self.tokens = self.supervised_tokens = 0
        for located in sequences_of(dataset, prefix):
            key = sequence_key(located.ids, located.supervised)
            if located.supervised.any() and key not in seen:
                seen.add(key)
                spans.append((located.row, located.span.start, located.span.stop))
                self.tokens += len(located.ids)
                self.supervised_tokens += int(located.supervised.sum())
                self.counts = _added(self.counts, np.bincount(located.ids))
        names = {f"{prefix}{name}": name for name in ("input_ids", "labels")}
        self.dataset = dataset.select_columns(list(names)).rename_columns(names).with_format("numpy")
        self._spans = np.array(spans, dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, row: int) -> TokenSequence | UnusableRow:
        place, start, stop = self._spans[row].tolist()
        tokens = self.dataset[place]
        supervised = tokens["labels"][start:stop] != -100
        supervised[:1] = False
        return TokenSequence(tokens["input_ids"][start:stop].astype(np.int32), supervised)


class VisionSequences:
    """The rows of one split with images, which become tokens only when they are asked for.

    `collator` makes what the teacher reads, `student` what the student does, where the teacher reads as much of its
    answers behind another prompt.
    """

    def __init__(
        self,
        dataset: Dataset,
        collator: VisionLabels,
        image_token_id: int | None,
        student: VisionLabels | None = None,
    ):
        self._dataset = dataset
        self._collator, self._image_token_id, self._student = collator, image_token_id, student
        self.counts = np.zeros(0, dtype=np.int64)
        for _, sequence in usable(self, range(min(len(dataset), _COUNTED_IMAGES))):
            if isinstance(sequence, TokenSequence):
                self.counts = _added(self.counts, np.bincount(sequence.ids))

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, row: int) -> TokenSequence | UnusableRow:
        example = self._example(row)
        if isinstance(example, UnusableRow):
            return example
        seen = images_of(self._collator.seen(example))
        images = tuple(image_hash(image) for image in seen)
        try:
            batch = self._collator([dict(example)])
        except Exception as error:
            # Processors say in ways of their own that an image no longer fits its tokens.
            refused = refusal(seen, self._collator.processor)
            if refused is not None:
                return UnusableRow(f"The processor refuses it: {refused}")
            cut = self._cut(example)
            if cut is None:
                error.add_note(f"It was raised for row {row} of the data.")
                raise
            return cut
        longest = self._collator.max_length
        # Collators of prompts and completions cut without a word.
        if longest is not None and batch["input_ids"].shape[1] >= longest:
            cut = self._cut(example)
            if cut is not None:
                return cut
        present = batch["attention_mask"][0].bool()
        ids, labels = batch["input_ids"][0][present].numpy(), batch["labels"][0][present].numpy()
        supervised = labels != -100
        if self._student is not None:
            longest = None if self._collator.view is None else self._collator.view.longest
            if longest is not None and len(ids) > longest:
                return UnusableRow(
                    f"It has {len(ids)} tokens behind the teacher's prompt; teacher_max_length is {longest}."
                )
            own = self._student([dict(example)])["labels"]
            supervised &= supervised.cumsum() <= int((own != -100).sum())
        supervised[:1] = False
        count = int((ids == self._image_token_id).sum()) if self._image_token_id is not None else 0
        return TokenSequence(
            ids.astype(np.int32), supervised, images, count, partial(self._readable, row), self._collator
        )

    def _example(self, row: int) -> Mapping[str, Any] | UnusableRow:
        columns = self._collator.image_columns
        stored = self._dataset[row]
        read = read_row(stored, columns if self._student is None else dict.fromkeys((*columns, "images")))
        return read if isinstance(read, UnusableRow) else {**read, STORED_IMAGES: stored.get("images")}

    def _readable(self, row: int) -> Mapping[str, Any]:
        """A row that could be read before. Raises UserError when that is no longer so."""
        example = self._example(row)
        if isinstance(example, UnusableRow):
            raise UserError(f"Row {row} can no longer be read: {example.reason}. Its image has changed meanwhile.")
        return example

    def _cut(self, example: Mapping[str, Any]) -> UnusableRow | None:
        """Says so when max_length cuts image tokens off a row, which no vision model survives."""
        longest = self._collator.max_length
        if longest is None:
            return None
        try:
            ids = replace(self._collator, max_length=None)([dict(example)])["input_ids"][0]
        except Exception:
            # What fails at any length is not for want of length.
            return None
        count, kept = (int((part == self._image_token_id).sum()) for part in (ids, ids[:longest]))
        if kept == count and (self._image_token_id is not None or len(ids) <= longest):
            return None
        return UnusableRow(
            f"Image tokens were truncated: max_length {longest} keeps {kept} of {count}, in a row of {len(ids)} "
            f"tokens. Raise max_length to {len(ids)} or more, or set it to null."
        )


@dataclass
class PreparedSequences:
    """What a recipe's training would see."""

    splits: dict[str, Sequences | VisionSequences]
    processing_class: Any
    preparation: dict[str, Any]
    collator: Any
    vision: bool
    template: TemplateReport
    """What the chat template makes of the training rows."""

    def batch(self, sequences: Sequence[TokenSequence]) -> tuple[dict[str, Any], Bool[Tensor, "batch position"]]:
        """Model inputs and the positions that predict a supervised token."""
        if self.vision:
            inputs = dict(self.collator([dict(sequence.example) for sequence in sequences]))
            supervised = inputs.pop("labels") != -100
            for row, sequence in enumerate(sequences):
                # Of a teacher's answer, as much as the student reads.
                supervised[row, : len(sequence.supervised)] &= torch.from_numpy(sequence.supervised)
            return inputs, supervised[:, 1:]
        longest = max(len(sequence.ids) for sequence in sequences)
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        mask, supervised = torch.zeros_like(ids), torch.zeros(len(sequences), longest, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            length = len(sequence.ids)
            ids[row, :length] = torch.from_numpy(sequence.ids)
            mask[row, :length] = 1
            supervised[row, :length] = torch.from_numpy(sequence.supervised)
        return {"input_ids": ids, "attention_mask": mask}, supervised[:, 1:]


def prepare(
    data: DatasetDict,
    args: DistillationConfig,
    processing_class: Any,
    judges_template: bool = True,
    view: TeacherView | None = None,
) -> PreparedSequences:
    """The sequences of "train" and, if it is there, "eval". Raises UserError for what training would refuse too.

    With a `view` they are those of a teacher that reads the answers behind it. Of a teacher that is compared with its
    student, the chat template is not judged.
    """
    # Looking at the columns should not fail where an image cannot be decoded.
    keep = () if view is None else view.reads
    unread = {str(split): image_column(canonical(dataset, str(split), keep=keep)) for split, dataset in data.items()}
    told = None if view is None else RowView(view, args.privileged_dropout, args.seed, args.teacher_max_length)
    if view is not None and view.images_column is not None:
        column = view.images_column
        unread = {split: second_image_column(dataset, column, split) for split, dataset in unread.items()}
    if args.answers_everything:
        unread["train"] = with_open_answers(unread["train"])
    check_training_data(unread["train"], unread.get("eval"), args, tokenizer_of(processing_class))
    in_our_tokens = view is not None and not args.own_tokens
    if told is not None and not in_our_tokens and "images" not in unread["train"].column_names:
        unread = {split: told.of_data(dataset) for split, dataset in unread.items()}
    beside = view if in_our_tokens else None
    rows = PreparedRows.of(args, processing_class, unread["train"], unread.get("eval"), judges_template, beside)
    labelling, vision = rows.labelling, rows.labelling.vision
    image_token_id, collator, student = image_token_of(processing_class), rows.collator, None
    if vision and told is not None:
        collator = replace(collator, view=told, max_length=collator.max_length if args.own_tokens else None)
        student = None if args.own_tokens else rows.collator
    prefix = TEACHER if in_our_tokens else ""
    return PreparedSequences(
        {
            split: VisionSequences(dataset, collator, image_token_id, student)
            if vision
            else Sequences(dataset, prefix)
            for split, dataset in {"train": rows.train, "eval": rows.evaluation}.items()
            if dataset is not None
        },
        processing_class,
        preparation_of(processing_class, args, labelling.chat_template, view),
        collator,
        vision,
        labelling.template_reports["train"],
    )


def usable(sequences: Sequences | VisionSequences, rows: range) -> Iterator[tuple[int, TokenSequence | UnusableRow]]:
    """The rows of a span that have something to judge, and those that cannot be read."""
    for row in rows:
        sequence = sequences[row]
        if isinstance(sequence, UnusableRow) or sequence.supervised.any():
            yield row, sequence


def _added(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The sum of two counts, the shorter one filled up with zeros."""
    if len(left) < len(right):
        left, right = right, left
    return left + np.pad(right, (0, len(left) - len(right)))
