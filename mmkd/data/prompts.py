"""What a row asks, with its pictures in their places: whoever answers sees the tokens and pixels of training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from transformers import ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from mmkd.errors import UserError

from .images import UnusableRow, read_row

PROMPT_CHARACTERS = 200
"""How much of a plain text is given to go on from."""


@dataclass(frozen=True)
class IllustratedText:
    """A plain text with its pictures, which it marks itself."""

    text: str
    images: tuple[Image.Image, ...]


RowPrompt = str | IllustratedText | list[dict[str, Any]]
"""A text, one with pictures, or messages whose parts hold the pictures."""


def question_of(row: Mapping[str, Any]) -> str | list[dict[str, Any]]:
    """What a row asks without its pictures: the prompt, or the messages before the assistant's last turns."""
    if "prompt" in row:
        return row["prompt"] if isinstance(row["prompt"], str) else [dict(message) for message in row["prompt"]]
    messages = [dict(message) for message in row["messages"]]
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return messages


def with_pictures(question: str | list[dict[str, Any]], images: Sequence[Image.Image] | None) -> RowPrompt:
    """A question and its pictures as training joins them; None says that the data has no pictures at all.

    Raises UserError for messages with more or fewer places than pictures.
    """
    if images is None:
        return question
    if isinstance(question, str):
        return IllustratedText(question, tuple(images))
    try:
        return prepare_multimodal_messages(question, images=list(images))
    except ValueError as error:
        raise UserError(f"A row's images do not fit its messages: {error}") from error


def prompt_of(row: Mapping[str, Any]) -> tuple[RowPrompt, str]:
    """What a row asks, with its pictures, and what it answers itself.

    Raises UserError for pictures that cannot be read, or that do not fit the messages.
    """
    read = read_row(row)
    if isinstance(read, UnusableRow):
        raise UserError(f"An image of the data cannot be read: {read.reason}. Correct the row or remove it.")
    images = read.get("images")
    if "text" in read and "messages" not in read and "prompt" not in read:
        return _begun(read["text"], images)
    question = question_of(read)
    answer = (read.get("completion") or "") if "prompt" in read else list(read["messages"])[len(question) :]
    if not isinstance(answer, str):
        answer = text_of(answer[-1].get("content")) if answer else ""
    return with_pictures(question, images), answer


def _begun(text: str, images: Sequence[Image.Image] | None) -> tuple[RowPrompt, str]:
    """The beginning of a text, to go on from, and the rest."""
    start = text[:PROMPT_CHARACTERS]
    # Whole words, so that no tokenizer is asked to go on within one.
    start = start.rpartition(" ")[0] or start
    return with_pictures(start, images), text[len(start) :]


def text_of(content: Any) -> str:
    """The words of a message's content."""
    if content is None or isinstance(content, str):
        return content or ""
    return " ".join(part["text"] for part in content if part.get("text"))


def words_of(question: RowPrompt) -> str:
    """The words of a question, to be read."""
    if isinstance(question, list):
        return "\n".join(text_of(message.get("content")) for message in question)
    return question if isinstance(question, str) else question.text


def model_inputs(processing_class: Any, prompts: Sequence[RowPrompt], tools: Sequence[Any] | None = None) -> Any:
    """What a model reads of a batch of prompts of one kind, padded on the left, as training renders them.

    `tools` are what the template says of functions, for each prompt of messages.
    Raises UserError for prompts with pictures and a model that reads text only.
    """
    first = prompts[0]
    is_processor = isinstance(processing_class, ProcessorMixin)
    if isinstance(first, str):
        tokenizer: Any = getattr(processing_class, "tokenizer", processing_class)
        # A tokenizer need not have a pad token where there is nothing to pad.
        return tokenizer(list(prompts), padding=len(prompts) > 1, padding_side="left", return_tensors="pt")
    if not is_processor and (isinstance(first, IllustratedText) or any(map(pictures_of, prompts))):
        raise UserError(
            "The rows have images, but the model reads text only: it has no processor. Use a vision-language model, "
            "or data without images."
        )
    tools = tools or [None] * len(prompts)
    texts = [_rendered(processing_class, prompt, own) for prompt, own in zip(prompts, tools, strict=True)]
    # The template has written the special tokens, and TRL's collator leaves them out of plain text with images too.
    options: dict[str, Any] = {
        "padding": len(prompts) > 1,
        "padding_side": "left",
        "add_special_tokens": False,
        "return_tensors": "pt",
    }
    if not is_processor:
        return processing_class(texts, **options)
    images: Any = [pictures_of(prompt) for prompt in prompts]
    # Processors take no batch without a picture.
    return processing_class(images=images if any(images) else None, text=texts, **options)


def pictures_of(question: RowPrompt) -> list[Image.Image]:
    """The pictures of a question in order."""
    if isinstance(question, IllustratedText):
        return list(question.images)
    if isinstance(question, str):
        return []
    contents = [message.get("content") for message in question]
    return [
        part["image"] for content in contents if isinstance(content, list) for part in content if part.get("image")
    ]


def _rendered(processing_class: Any, question: RowPrompt, tools: Any) -> str:
    if isinstance(question, IllustratedText):
        return question.text
    assert isinstance(question, list)
    # A language model's template reads contents as they are.
    is_processor = isinstance(processing_class, ProcessorMixin)
    messages = prepare_multimodal_messages(question, images=[]) if is_processor else question
    return processing_class.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
