"""trl's collator of rows with images, with labels as text has them: answers end, and no image is a target."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from jinja2 import TemplateError
from PIL import Image as PILImage
from torch import Tensor
from trl.data_utils import apply_chat_template, is_conversational, prepare_multimodal_messages
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from mmkd.errors import UserError
from mmkd.models.load import image_token_of, tokenizer_of
from mmkd.teachers.cached import images_of

from .row_views import RowView
from .truncated import Ending, is_truncated
from .turns import Turns, overlapping, template_settings
from .weights import check_weights

# Tiles of Idefics3 and SmolVLM, of which a small image shows none.
_TILE = re.compile(r"<row_\d+_col_\d+>")
_IMAGE = PILImage.new("RGB", (64, 64))


@dataclass
class VisionLabels(DataCollatorForVisionLanguageModeling):
    """trl's collator; plain text ends with EOS, tools reach the template, and tokens of images are never labels.

    Raises UserError where `turns` cannot tell what the assistant says.
    """

    turns: Turns | None = None
    """Tells what is supervised under assistant_only_loss."""
    eos_token: str | None = None
    """Ends plain text; by default that of the processor's tokenizer."""
    view: RowView | None = None
    """Behind what else than its own prompt a row's answer is read."""
    image_tokens: "ImageTokens" = field(init=False)

    def __post_init__(self) -> None:
        self.image_tokens = ImageTokens.made_by(self.processor)
        tokenizer: Any = tokenizer_of(self.processor)
        self.eos_token = self.eos_token or tokenizer.eos_token

    @property
    def image_columns(self) -> tuple[str, ...]:
        """The columns with the images that are read, where rows have them."""
        return ("images",) if self.view is None else self.view.image_columns

    def seen(self, example: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row as it is read."""
        return example if self.view is None else self.view.rewrite(example)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of rows with their images decoded."""
        examples = [self._ended(self.seen(example)) for example in examples]
        turns = self._turns
        if turns.how == "all":
            for number, example in enumerate(examples):
                # Rows of a stream, or of an evaluation, that nobody has looked at before.
                check_weights(example, number, "batch", self.completion_only_loss)
        if self._reads_turns(examples, turns):
            batch = self._collate_conversations(examples, turns)
        else:
            batch = dict(super().torch_call(examples))
        batch["labels"] = batch["labels"].masked_fill(self.image_tokens.of(batch["input_ids"]), -100)
        for number, example in enumerate(examples):
            if is_truncated(example):
                self._unend(example, turns, batch, number)
        return batch

    def unexpanded(self, examples: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """The tokens of a batch's rows with one placeholder for each image, before the processor puts those in."""
        examples = [self._ended(self.seen(example)) for example in examples]
        turns = self._turns
        if self._reads_turns(examples, turns):
            parts = [[turns.read(example, self.completion_only_loss, images_of(example)).text] for example in examples]
        else:
            parts = [self._texts(example) for example in examples]
        tokenizer: Any = tokenizer_of(self.processor)
        # trl makes tokens of prompt and completion apart.
        tokens = [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts] for texts in parts]
        return [[token for part in row for token in part] for row in tokens]

    def _texts(self, example: Mapping[str, Any]) -> list[str]:
        """The texts that trl makes tokens of."""
        if "messages" in example:
            messages = prepare_multimodal_messages(example["messages"], images=images_of(example))
            processor: Any = self.processor
            return [processor.apply_chat_template(messages, chat_template=self.chat_template, tokenize=False)]
        if self.dataset_text_field in example:
            return [example[self.dataset_text_field]]
        row = {"prompt": example["prompt"], "completion": example["completion"]}
        if is_conversational(row):
            row["prompt"] = prepare_multimodal_messages(row["prompt"], images=images_of(example))
            row["completion"] = prepare_multimodal_messages(row["completion"])
            row = apply_chat_template(row, self.processor)  # pyright: ignore[reportArgumentType]
        return [row["prompt"], row["completion"]]

    @property
    def _turns(self) -> Turns:
        return Turns(self.processor, self.chat_template) if self.turns is None else self.turns

    def _reads_turns(self, examples: Sequence[Mapping[str, Any]], turns: Turns) -> bool:
        """Whether conversations are rendered here and not by trl.

        trl's own way gives one set of tools to all rows of a batch, and no place to what the assistant says in some
        processors.
        """
        settings = [value for example in examples for value in template_settings(example).values()]
        return is_conversational(dict(examples[0])) and (turns.how != "all" or any(settings))

    def _unend(self, example: Mapping[str, Any], turns: Turns, batch: Mapping[str, Any], row: int) -> None:
        """Takes the labels from the end of an answer that was cut off."""
        (present,) = batch["attention_mask"][row].nonzero(as_tuple=True)
        ending = Ending.of(turns, example, self.eos_token)
        count = ending.tokens(example, batch["input_ids"][row, present].tolist())
        if count is None and self.max_length is None:
            raise UserError(
                f"A row is marked as truncated, and does not end as other answers do ({ending.text!r}). Remove the "
                "row, or use another template (chat_template_path)."
            )
        batch["labels"][row, present[len(present) - (count or 0) :]] = -100

    def _ended(self, example: Mapping[str, Any]) -> dict[str, Any]:
        """A row whose plain text ends as trl ends that of rows without images."""
        for name in (self.dataset_text_field, "completion"):
            text = example.get(name)
            end = self.eos_token or ""
            if isinstance(text, str):
                return {**example, name: text if text.endswith(end) else text + end}
        return dict(example)

    def _collate_conversations(self, examples: list[dict[str, Any]], turns: Turns) -> dict[str, Any]:
        """Conversations, each rendered with its own tools and supervised where `turns` says so."""
        images = [images_of(example) for example in examples]
        read = [
            turns.read(example, self.completion_only_loss, shown)
            for example, shown in zip(examples, images, strict=True)
        ]
        processor: Any = self.processor
        batch = processor(
            text=[text for text, _ in read],
            # Processors take no batch of rows that are all without images.
            images=images if any(images) else None,
            padding=True,
            padding_side="right",
            pad_to_multiple_of=self.pad_to_multiple_of,
            truncation=self.max_length is not None,
            max_length=self.max_length,
            # The template writes them.
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
        )
        offsets, shifts = batch.pop("offset_mapping"), batch.pop("text_replacement_offsets", None)
        # Tensors only now: Idefics3's and InternVL's processors fail to leave the offsets out of them.
        batch.convert_to_tensors("pt")
        spans = [
            [(_shifted(start, inserted), _shifted(end, inserted)) for start, end in rendering.spans]
            for rendering, inserted in zip(read, shifts or [[]] * len(read), strict=True)
        ]
        overlaps = np.stack(
            [overlapping(row_offsets, row_spans) for row_offsets, row_spans in zip(offsets, spans, strict=True)]
        )
        ids, present = batch["input_ids"], batch["attention_mask"].bool()
        return {**batch, "labels": ids.masked_fill(~(torch.from_numpy(overlaps) & present), -100)}


@dataclass(frozen=True)
class ImageTokens:
    """The tokens that a processor writes wherever a row has an image, and nobody else."""

    ids: Int[Tensor, "id"]
    """Patches, and the special tokens that processor and template put around them."""
    blank: Int[Tensor, "id"]
    """What else a processor puts there, such as empty lines: an image's where it touches the image."""

    @classmethod
    def made_by(cls, processor: Any) -> "ImageTokens":
        """Those of a processor, seen in what it makes of an image."""
        patch = image_token_of(processor)
        if patch is None:
            return cls(torch.tensor([], dtype=torch.long), torch.tensor([], dtype=torch.long))
        tokenizer: Any = tokenizer_of(processor)
        added = tokenizer.get_added_vocab()
        placeholder = getattr(processor, "boi_token", None) or processor.image_token
        expanded = set(processor(text=[placeholder], images=[[_IMAGE]], add_special_tokens=False)["input_ids"][0])
        special = {patch, *added.values()}
        tiles = {index for token, index in added.items() if _TILE.fullmatch(token)}
        ids = {patch, *((expanded | _around_image(processor)) & special), *tiles}
        return cls(torch.tensor(sorted(ids)), torch.tensor(sorted(expanded - special), dtype=torch.long))

    def of(self, ids: Int[Tensor, "batch position"]) -> Bool[Tensor, "batch position"]:
        """Which tokens of a batch are an image's."""
        image_tokens, blank = torch.isin(ids, self.ids), torch.isin(ids, self.blank)
        while True:
            beside = torch.zeros_like(image_tokens)
            beside[:, 1:] |= image_tokens[:, :-1]
            beside[:, :-1] |= image_tokens[:, 1:]
            grown = image_tokens | (blank & beside)
            if torch.equal(grown, image_tokens):
                return image_tokens
            image_tokens = grown


def _around_image(processor: Any) -> set[int]:
    """What a message with an image has and one without has not."""
    if processor.chat_template is None:
        return set()
    text = {"type": "text", "text": "a"}
    contents: list[Any] = [[text], [{"type": "image"}, text]]
    # A template that takes no parts renders no images either.
    try:
        without, with_image = (
            processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
            for content in contents
        )
    except (TemplateError, TypeError):
        return set()
    tokenizer: Any = tokenizer_of(processor)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (without, with_image)]
    return {*ids[1]} - {*ids[0]}


def _shifted(place: int, inserted: list[dict[str, Any]]) -> int:
    """Where a character stands once placeholders before it have been replaced by the tokens of their images."""
    gains = [
        insertion["new_span"][1] - insertion["span"][1] for insertion in inserted if insertion["span"][1] <= place
    ]
    return place + (gains[-1] if gains else 0)
