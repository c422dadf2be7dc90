"""A rollout as text, and rows with it as the answer."""

from collections.abc import Mapping
from typing import Any

from mmkd.alignment.common_runs import shared_length
from mmkd.data.teacher_view import ANSWER, answer_of

from .answers import Placed


def said(tokenizer: Any, ids: list[int], placed: Placed) -> tuple[str, str]:
    """The text of a rollout, and that of its prompt and the rollout; `ids` are those of the whole row."""
    start, rollout = placed
    spoken = rollout.ids[:-1] if rollout.ended else rollout.ids
    prompt, whole = (str(tokenizer.decode(part)) for part in (ids[:start], [*ids[:start], *spoken]))
    # Alone, the rollout would lose the space before its first word where a tokenizer writes it into the word.
    text = whole[shared_length(prompt, whole) :]
    return text, str(tokenizer.decode([*ids[:start], *spoken], skip_special_tokens=True))


def answered(example: Mapping[str, Any], text: str) -> dict[str, Any]:
    """A row of messages, or of prompt and completion, with this text as the answer.

    A teacher's view may still show the data's own answer.
    """
    example = {ANSWER: answer_of(example), **example}
    if "messages" in example:
        asked = without_answer(example["messages"])
        return {**example, "messages": [*asked, turn(text, asked)]}
    prompt = example["prompt"]
    return {**example, "completion": text if isinstance(prompt, str) else [turn(text, prompt)]}


def without_answer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages before the assistant's last turn."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return list(messages[:end])


def turn(text: str, others: list[dict[str, Any]]) -> dict[str, Any]:
    """What the assistant says, in parts where the other messages are."""
    in_parts = any(isinstance(message.get("content"), list) for message in others)
    return {"role": "assistant", "content": [{"type": "text", "text": text}] if in_parts else text}
