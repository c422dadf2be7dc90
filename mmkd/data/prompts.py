"""The prompt of a row with its pictures, rendered to the same tokens and pixels as in training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from transformers import ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from mmkd.errors import UserError

from .images import UnusableRow, read_row

PROMPT_CHARACTERS = 200
"""The number of characters of a plain text that serve as its prompt."""


@dataclass(frozen=True)
class IllustratedText:
    """A plain text with its pictures; the text contains their marks."""

    text: str
    images: tuple[Image.Image, ...]


RowPrompt = str | IllustratedText | list[dict[str, Any]]
"""A text, a text with pictures, or messages whose parts hold the pictures."""


def question_of(row: Mapping[str, Any]) -> str | list[dict[str, Any]]:
    """The prompt of a row without its pictures: `prompt`, or the messages before the assistant's last turns."""
    if "prompt" in row:
        return row["prompt"] if isinstance(row["prompt"], str) else [dict(message) for message in row["prompt"]]
    messages = [dict(message) for message in row["messages"]]
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return messages


def with_pictures(question: str | list[dict[str, Any]], images: Sequence[Image.Image] | None) -> RowPrompt:
    """A question joined with its pictures as in training; `images` is None if the data has no pictures at all.

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
    """The prompt of a row with its pictures, and the row's own answer.

    Raises UserError for pictures that cannot be read or do not fit the messages.
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
    """The beginning of a text, as a prompt, and its continuation."""
    start = text[:PROMPT_CHARACTERS]
    # Cut between words: a prompt that ends within a word has other tokens than the text.
    start = start.rpartition(" ")[0] or start
    return with_pictures(start, images), text[len(start) :]


def text_of(content: Any) -> str:
    """The text of a message's content."""
    if content is None or isinstance(content, str):
        return content or ""
    return " ".join(part["text"] for part in content if part.get("text"))


def words_of(question: RowPrompt) -> str:
    """The text of a question, for readers."""
    if isinstance(question, list):
        return "\n".join(text_of(message.get("content")) for message in question)
    return question if isinstance(question, str) else question.text


def model_inputs(
    processing_class: Any, prompts: Sequence[RowPrompt], tools: Sequence[Any] | None = None, answering: bool = True
) -> Any:
    """The inputs of a model for a batch of prompts of one kind, padded on the left, rendered as in training.

    `tools` are the descriptions of functions for the template, one entry per prompt of messages. With `answering`
    messages end with what an answer begins with.
    Raises UserError for prompts with pictures and a model that reads text only.
    """
    first = prompts[0]
    is_processor = isinstance(processing_class, ProcessorMixin)
    if isinstance(first, str):
        tokenizer: Any = getattr(processing_class, "tokenizer", processing_class)
        # A tokenizer without a pad token can still encode a single prompt.
        return tokenizer(list(prompts), padding=len(prompts) > 1, padding_side="left", return_tensors="pt")
    if not is_processor and (isinstance(first, IllustratedText) or any(map(pictures_of, prompts))):
        raise UserError(
            "The rows have images, but the model reads text only: it has no processor. Use a vision-language model, "
            "or data without images."
        )
    tools = tools or [None] * len(prompts)
    pairs = zip(prompts, tools, strict=True)
    texts = [_rendered(processing_class, prompt, own, answering) for prompt, own in pairs]
    # The template writes the special tokens, and TRL's collator adds none to plain text with images either.
    options: dict[str, Any] = {
        "padding": len(prompts) > 1,
        "padding_side": "left",
        "add_special_tokens": False,
        "return_tensors": "pt",
    }
    if not is_processor:
        return processing_class(texts, **options)
    images: Any = [pictures_of(prompt) for prompt in prompts]
    # Processors reject an empty list of pictures.
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


def _rendered(processing_class: Any, question: RowPrompt, tools: Any, answering: bool) -> str:
    if isinstance(question, IllustratedText):
        return question.text
    assert isinstance(question, list)
    # The template of a language model expects contents as text, that of a processor as parts.
    is_processor = isinstance(processing_class, ProcessorMixin)
    messages = prepare_multimodal_messages(question, images=[]) if is_processor else question
    return processing_class.apply_chat_template(messages, tools=tools, add_generation_prompt=answering, tokenize=False)
