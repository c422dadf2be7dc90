"""What of a rendered conversation the assistant says: by the template's own marks, or by rendering it turn by turn."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool
from jinja2 import TemplateError
from transformers import ProcessorMixin
from trl.chat_template_utils import (
    get_training_chat_template,
    has_generation_markers,
    is_chat_template_stop_token_trained,
)
from trl.data_utils import (
    is_conversational,
    is_conversational_from_value,
    maybe_convert_to_chatml,
    prepare_multimodal_messages,
)

from mmkd.data.messages import is_learnt
from mmkd.errors import UserError
from mmkd.models.load import tokenizer_of
from mmkd.seams.transformers_seam import marked_spans

logger = logging.getLogger(__name__)


class Rendering(NamedTuple):
    """A conversation as a chat template writes it."""

    text: str
    spans: list[tuple[int, int]]
    """The characters that the assistant says, the end of its turns included."""


@dataclass(frozen=True)
class Turns:
    """Finds the assistant's turns in what a chat template renders."""

    processing_class: Any
    template: str | None = None
    """trl's training version of the processing class' own template, where there is one."""
    how: Literal["marks", "turns", "all"] = "all"
    """By the template's {% generation %}, by rendering it turn by turn, or not at all: everything counts."""

    @classmethod
    def of(cls, processing_class: Any) -> "Turns":
        """Of a tokenizer or processor. Raises UserError where it has no chat template."""
        own = processing_class.chat_template
        if own is None:
            raise UserError(
                f"The {type(processing_class).__name__} has no chat template, so nothing says which tokens are the "
                "assistant's. Set chat_template_path, or map the data to prompt and completion."
            )
        template = None if has_generation_markers(own) else _training_template(processing_class)
        marked = template is not None or has_generation_markers(own)
        if marked and not is_chat_template_stop_token_trained(processing_class, chat_template=template):
            logger.warning(
                "The chat template leaves the token that ends an assistant's turn outside of {% generation %}: the "
                "student may not learn to stop. Move it inside, or set assistant_only_loss: false."
            )
        return cls(processing_class, template, "marks" if marked else "turns")

    def read(self, row: Mapping[str, Any], completion_only: bool = True, images: Sequence[Any] = ()) -> Rendering:
        """A row of messages, or of prompt and completion, of which only the latter counts unless told otherwise.

        Raises UserError where the template writes a turn differently once others follow it.
        """
        prompt = row.get("messages") or row["prompt"]
        messages = self._as_read([*prompt, *(row.get("completion") or [])], images)
        settings = template_settings(row)
        if self.how == "all":
            text = self.render(messages, settings)
            spans = [(0, len(text))]
        else:
            text, spans = (self._marked if self.how == "marks" else self._told_apart)(messages, settings)
            spans = self._learnt(messages, settings, spans)
        if completion_only and row.get("completion"):
            asked = self.render(messages[: len(prompt)], settings, add_generation_prompt=True)
            first = self._start(asked, text)
            spans = [(max(first, start), end) for start, end in spans if end > first]
        return Rendering(text, spans)

    def _as_read(self, messages: list[Any], images: Sequence[Any]) -> list[Any]:
        if isinstance(self.processing_class, ProcessorMixin):
            return prepare_multimodal_messages(messages, images=list(images))
        return messages

    def render(self, messages: list[Any], settings: Mapping[str, Any], add_generation_prompt: bool = False) -> str:
        """The text of messages, as the processing class takes them; `settings` are those of their row."""
        return self.processing_class.apply_chat_template(
            messages,
            **{"chat_template": self.template, **settings},
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )

    def _learnt(
        self, messages: list[Any], settings: Mapping[str, Any], spans: list[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """The spans without those of turns whose weight is 0."""
        learnt = [is_learnt(message) for message in messages if message["role"] == "assistant"]
        if all(learnt):
            return spans
        if len(spans) == len(learnt):
            return [span for span, is_learnt in zip(spans, learnt, strict=True) if is_learnt]
        # Some templates mark a turn in pieces, or not all turns.
        turns = self._told_apart(messages, settings).spans
        read = [turn for turn, is_learnt in zip(turns, learnt, strict=True) if not is_learnt]
        return [(a, b) for a, b in spans if not any(a < end and start < b for start, end in read)]

    def _marked(self, messages: list[Any], settings: Mapping[str, Any]) -> Rendering:
        template: Any = self.template or self.processing_class.chat_template
        if isinstance(template, dict):
            named = "tool_use" if settings.get("tools") and "tool_use" in template else "default"
            template = template[named]
        special = tokenizer_of(self.processing_class).special_tokens_map
        return Rendering(*marked_spans(messages, template, {**special, **settings}))

    def _told_apart(self, messages: list[Any], settings: Mapping[str, Any]) -> Rendering:
        """The rendering, where a turn is what it adds to the messages before it and the prompt to speak."""
        text, spans = self.render(messages, settings), []
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            # Without messages there is nothing to render: the turn begins where another content would.
            before = (
                self.render(messages[:place], settings, add_generation_prompt=True)
                if place
                else text[: _common(text, self.render([_otherwise(message)], settings))]
            )
            through = text if place + 1 == len(messages) else self.render(messages[: place + 1], settings)
            # Some templates end every conversation with EOS, which goes when it goes on.
            tokenizer: Any = tokenizer_of(self.processing_class)
            ends = ("", tokenizer.eos_token or "")
            end = next((len(through) - len(end) for end in ends if _continues(text, through, end)), None)
            start = self._start(before, text)
            bare = "" if start == len(before) else self.render(messages[:place], settings)
            if end is None or start < len(bare):
                raise UserError(
                    f"The chat template writes message {place} differently once others follow it, so that what the "
                    "assistant says cannot be told from the rest. Use a template that marks it by {% generation %} "
                    "... {% endgeneration %} (chat_template_path), map the data to prompt and completion with one "
                    "answer each, or set assistant_only_loss: false."
                )
            spans.append((start, end))
        return Rendering(text, spans)

    def _start(self, prompt: str, text: str) -> int:
        """Where an answer begins in a text: after its prompt, or at the token in which the two part."""
        common = _common(prompt, text)
        if common == len(prompt):
            return common
        tokenizer: Any = tokenizer_of(self.processing_class)
        offsets = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return max((end for _, end in offsets if end <= common), default=0)


def assistant_labels(
    row: Mapping[str, Any], number: int, turns: Turns, completion_only: bool, split: str
) -> dict[str, list[int]]:
    """The tokens of a conversation, labelled where the assistant speaks.

    Raises UserError, with the row's number, where that cannot be told.
    """
    if is_conversational_from_value(dict(row)):
        row = maybe_convert_to_chatml(dict(row))
    if not is_conversational(dict(row)):
        raise UserError(
            f"Row {number} of the {split} data is not a conversation, so it has no assistant's turns. Set "
            "assistant_only_loss: false, or map the data to messages."
        )
    try:
        text, spans = turns.read(row, completion_only)
    except UserError as error:
        raise UserError(f"Row {number} of the {split} data: {error}") from error
    tokenizer: Any = tokenizer_of(turns.processing_class)
    # As `apply_chat_template` of a processor does, unlike that of a tokenizer.
    begins = isinstance(turns.processing_class, ProcessorMixin) and not _starts_with_bos(text, tokenizer)
    encoded = tokenizer(text, add_special_tokens=begins, return_offsets_mapping=True)
    overlaps = overlapping(encoded["offset_mapping"], spans)
    labels = [
        index if overlap else -100 for index, overlap in zip(encoded["input_ids"], overlaps.tolist(), strict=True)
    ]
    return {"input_ids": encoded["input_ids"], "labels": labels}


def overlapping(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> Bool[np.ndarray, "token"]:
    """Which tokens, given by their characters, share one with a span."""
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    overlaps = np.zeros(len(starts), dtype=bool)
    for start, end in spans:
        overlaps |= (starts < end) & (ends > start)
    return overlaps


def template_settings(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row gives to its chat template besides messages: tools, and `chat_template_kwargs`."""
    tools = row.get("tools")
    # Empty tools render the boilerplate of tools in some templates.
    tools = (json.loads(tools) if isinstance(tools, str) else tools) or None
    return {"tools": tools, **(row.get("chat_template_kwargs") or {})}


def _training_template(processing_class: Any) -> str | None:
    """trl's own version of a template that it knows, with marks."""
    # trl tells by an error which templates it does not know, and renders tools on the way, which some refuse.
    try:
        return get_training_chat_template(processing_class)
    except (ValueError, TypeError, TemplateError):
        return None


def _otherwise(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of the same role whose content begins with another letter."""
    content = message.get("content") or ""
    text = content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)
    letter = "b" if text.strip().startswith("a") else "a"
    other: Any = letter if isinstance(content, str) else [{"type": "text", "text": letter}]
    return {"role": message["role"], "content": other}


def _common(first: str, second: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def _continues(text: str, through: str, end: str) -> bool:
    return through.endswith(end) and text.startswith(through[: len(through) - len(end)])


def _starts_with_bos(text: str, tokenizer: Any) -> bool:
    return tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
