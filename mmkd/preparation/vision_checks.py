"""What is asked of rows with images and of who reads them, each with a clear error."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import ProcessorMixin

from mmkd.data.recordings import PARTS, advice, check_no_recordings
from mmkd.errors import UserError
from mmkd.models.load import image_token_of
from mmkd.teachers.cached import images_of

from .row_names import RowNames


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
    if image_token_of(processor) is None:
        raise UserError(
            f"The {role}'s processor {type(processor).__name__} has no image_token_id, so its visual tokens cannot be "
            "found in the text. Use a model that puts its images between the tokens (LLaVA, Qwen-VL, Idefics3, "
            "SmolVLM, InternVL, Gemma 3, ...).",
            because="not built",
        )


def processor_of_teacher(processing_class: Any, name: str) -> ProcessorMixin:
    """The teacher's processor. Raises UserError when it has none: it cannot see the images of the data."""
    if not isinstance(processing_class, ProcessorMixin):
        raise UserError(
            f"The data has images, but the teacher {name or 'given'!r} reads text only. Use a vision-language "
            "teacher, or data without images.",
            because="meaning",
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
    """Raises UserError for a row of a split that holds videos or audio, which no method here learns from."""
    check_no_recordings(row, f"The {split} data")
    for part in _parts(row):
        if part.get("type") in PARTS:
            kind = PARTS[part["type"]]
            raise UserError(f"The {split} data has {kind} in its messages: {advice(kind)}.", because="not built")


def _check_no_recorded_text(text: str, processor: Any, name: str) -> None:
    """Raises UserError for a placeholder of a video or audio, which a model would read as a word without meaning."""
    for attribute, kind in (("video_token", "videos"), ("audio_token", "audio")):
        token = getattr(processor, attribute, None)
        if isinstance(token, str) and token and token in text:
            raise UserError(f"{name} holds {token!r} in its text: {advice(kind)}.", because="not built")


def _parts(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The content parts of all messages of a row."""
    parts: list[Mapping[str, Any]] = []
    for column in ("messages", "prompt", "completion"):
        messages = row.get(column)
        for message in messages if isinstance(messages, list) else []:
            content = message.get("content")
            parts += content if isinstance(content, list) else []
    return parts


def _texts(row: Mapping[str, Any]) -> list[str]:
    """All text of a row."""
    plain = [row[name] for name in ("text", "prompt", "completion") if isinstance(row.get(name), str)]
    messages = [message for name in ("messages", "prompt", "completion") for message in _messages(row.get(name))]
    contents = [message["content"] for message in messages if isinstance(message.get("content"), str)]
    return [*plain, *contents, *(part["text"] for part in _parts(row) if isinstance(part.get("text"), str))]


def _messages(value: Any) -> list[Mapping[str, Any]]:
    return value if isinstance(value, list) else []


def check_placeholders(example: Mapping[str, Any], side: Any, names: RowNames) -> None:
    """Raises UserError when a row, as one side's `VisionLabels` see it, has more or fewer placeholders than images."""
    row, processor = side.seen(example), side.processor
    images = len(images_of(row))
    conversation = row.get("messages", row.get("prompt"))
    _check_no_recorded_text("\n".join(_texts(row)), processor, names.of(example))
    if isinstance(conversation, list):
        # Without parts, trl puts all images before the first question.
        structured = any(isinstance(message.get("content"), list) for message in conversation)
        placeholders = sum(part.get("type") == "image" for part in _parts(row)) if structured else images
    else:
        text = row.get("text", row.get("prompt")) or ""
        placeholders = text.count(getattr(processor, "boi_token", None) or processor.image_token)
    if placeholders != images:
        advice = "remove the surplus images" if images > placeholders else "add the missing images"
        told = "" if side.view is None else " for the teacher (teacher_view)"
        raise UserError(
            f"{names.of(example)} has{told} {images} images and {placeholders} placeholders for them: {advice}, or "
            "put as many parts {type: image} into its messages."
        )


def image_sizes(
    mask: Bool[Tensor, "position"], images: list[Any], processor: Any, name: Callable[[], str]
) -> list[int]:
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
    return int((output["input_ids"] == image_token_of(processor)).sum())
