"""Rows with images as a server is asked about them: pictures and text, which it makes tokens itself."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor
from trl.data_utils import is_conversational, prepare_multimodal_messages

from mmkd.models.load import image_token_of, tokenizer_of
from mmkd.teachers.cached import images_of
from mmkd.teachers.vllm_rows import ServedRow
from mmkd.teachers.vllm_wire import data_url

from .row_names import row_key
from .turns import template_settings
from .vision_labels import VisionLabels

_AROUND = 8


def served_rows(
    examples: Sequence[Mapping[str, Any]], batch: Mapping[str, Any], collator: VisionLabels
) -> list[ServedRow | None]:
    """Rows whose images are decoded, of a batch that this collator made of them; None for those without."""
    seen = [collator.seen(example) for example in examples]
    if not any(map(images_of, seen)):
        return [None] * len(examples)
    ids: Int[Tensor, "batch position"] = batch["input_ids"]
    present: Bool[Tensor, "batch position"] = batch["attention_mask"].bool()
    placeholders = _placeholders(collator.processor)
    shorts = collator.unexpanded(examples)
    return [
        _served(example, row_key(row), short, row_ids[row_present].tolist(), placeholders)
        if images_of(example)
        else None
        for row, example, short, row_ids, row_present in zip(examples, seen, shorts, ids, present, strict=True)
    ]


@dataclass(frozen=True)
class _Placeholders:
    text: Collection[int]
    """What stands for an image in the text of a row."""
    piece: int
    """What stands for a piece of it in its tokens."""


def _placeholders(processor: Any) -> _Placeholders:
    tokenizer: Any = tokenizer_of(processor)
    names = (getattr(processor, "boi_token", None), processor.image_token)
    piece = image_token_of(processor)
    assert piece is not None, "it is asked for before"
    return _Placeholders({tokenizer.convert_tokens_to_ids(name) for name in names if name}, piece)


def _served(
    example: Mapping[str, Any], key: int, short: Sequence[int], ids: Sequence[int], placeholders: _Placeholders
) -> ServedRow:
    """A row by its tokens without and with those of its images; `key` is that of the row in the data."""
    head, head_length = _head(short, ids, placeholders)
    messages = messages_of(example)
    return ServedRow(
        tuple(data_url(image) for image in images_of(example)),
        messages,
        {} if messages is None else template_settings(example),
        head,
        head_length,
        placeholders.piece,
        key,
    )


def messages_of(example: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The messages of a row with places for its images; None where the row is plain text."""
    if not is_conversational(dict(example)):
        return None
    messages = example["messages"] if "messages" in example else [*example["prompt"], *example["completion"]]
    prepared = prepare_multimodal_messages(messages, images=images_of(example))
    return [{**message, "content": _without_pixels(message.get("content"))} for message in prepared]


def _without_pixels(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return [{"type": "image"} if part["type"] == "image" else part for part in content]


def _head(short: Sequence[int], ids: Sequence[int], placeholders: _Placeholders) -> tuple[list[int], int]:
    """The first tokens of a row as `short` has them, one placeholder per image, and as how many of `ids` they stand.

    From there on, both go on alike, as far as `ids` go. Nothing at all where they never do.
    """
    begin, own_begin = _after_last(short, placeholders.text), _after_last(ids, [placeholders.piece])
    # What a processor writes behind the last of an image's tokens, and may write together with the text behind it.
    for skipped in range(_AROUND):
        for own in range(skipped, -1, -1):
            rest, own_rest = short[begin + skipped - own :], ids[own_begin + own :]
            if list(rest[: len(own_rest)]) == list(own_rest):
                return list(short[: begin + skipped - own]), own_begin + own
    return [], 0


def _after_last(ids: Sequence[int], wanted: Collection[int]) -> int:
    return max((place + 1 for place, token in enumerate(ids) if token in wanted), default=0)
