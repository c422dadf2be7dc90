"""Comparison of messages with their rendering: parts that a chat template drops, and text that it adds."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .messages import is_learnt

_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# Keys that templates write in their own form, or whose parts are checked one by one.
_KNOWN = {"role", "content", "tool_calls", "tool_call_id", "weight", *_THOUGHTS}
_SHOWN = 60


@dataclass(frozen=True)
class MissingPart:
    """A part of a message that is missing in its rendering."""

    message: int
    what: str
    """Such as "the content of the user"."""
    text: str
    answer: bool
    """Whether the part belongs to what the student learns."""

    def __str__(self) -> str:
        shown = self.text if len(self.text) <= _SHOWN else self.text[:_SHOWN] + "..."
        return f"{self.what} in message {self.message} ({shown!r})"


@dataclass(frozen=True)
class _Piece:
    what: str
    text: str
    answer: bool = False


def missing_parts(messages: Sequence[Mapping[str, Any]], tools: Any, rendered: str) -> list[MissingPart]:
    """The parts of a conversation that do not occur in its rendering by a template, in order.

    A template may strip white space, write JSON in its own way and move parts. Reasoning before the last question does
    not count as an answer, since many templates drop it on purpose, as in the training of their models.
    """
    last_question = max((place for place, entry in enumerate(messages) if entry.get("role") == "user"), default=-1)
    pieces = [
        (place, piece)
        for place, message in enumerate(messages)
        for piece in _pieces(message, learnt=place > last_question)
    ]
    pieces += [(-1, _Piece("the tool", str(name))) for name in _names(tools)]
    occupied: list[tuple[int, int]] = []
    unrendered = []
    # Longer parts first, because a shorter part may also occur within a longer one.
    for place, piece in sorted(pieces, key=lambda entry: -len(entry[1].text)):
        span = next(_places(piece.text, rendered, occupied), None)
        if span is None:
            unrendered.append(MissingPart(place, piece.what, piece.text, piece.answer))
        else:
            occupied.append(span)
    return sorted(unrendered, key=lambda entry: entry.message)


def unknown_keys(messages: Iterable[Mapping[str, Any]], template: str) -> set[str]:
    """Keys with a value in some message whose name does not occur in the template, which therefore drops them."""
    keys = {key for message in messages for key, value in message.items() if value not in (None, "", [])}
    return {key for key in keys - _KNOWN if not re.search(rf"\b{re.escape(key)}\b", template)}


def added(rendered: str, messages: Sequence[Mapping[str, Any]]) -> str | None:
    """The template's own system prompt: words before a conversation without a system message; None if it has none."""
    if not messages or any(message.get("role") in ("system", "developer") for message in messages):
        return None
    texts = [piece.text for piece in _pieces(messages[0], learnt=True) if piece.text]
    before = rendered.split(texts[0])[0] if texts else ""
    # Lines of fewer than three words are markup: special tokens and names of roles.
    sentences = [line.strip() for line in re.split(r"<[^<>\n]*>|\[[A-Z/_]+\]|\n", before)]
    prompts = [line for line in sentences if line.count(" ") >= 2]
    return " ".join(prompts) or None


def _pieces(message: Mapping[str, Any], learnt: bool) -> list[_Piece]:
    """The parts of a message that its rendering must contain; with `learnt`, its reasoning is part of the answer."""
    role = str(message.get("role"))
    answers = is_learnt(message)
    of = f"of the {role}"
    pieces = [
        _Piece(f"{key} {of}", text.strip(), answers and learnt)
        for key in _THOUGHTS
        if isinstance(text := message.get(key), str)
    ]
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    for text in (part.get("text") for part in parts if isinstance(part, Mapping)):
        if isinstance(text, str):
            thought, closed, answer = text.rpartition("</think>")
            if closed:
                pieces.append(_Piece(f"the thought {of}", thought.split("<think>")[-1].strip(), answers and learnt))
            pieces.append(_Piece(f"the content {of}", answer.strip(), answers))
    for call in message.get("tool_calls") or []:
        function = call.get("function") or call
        pieces.append(_Piece(f"the tool call {of}", str(function.get("name") or ""), answers))
        arguments = function.get("arguments")
        pieces += [_Piece(f"an argument of a tool call {of}", text, answers) for text in _leaves(arguments)]
    return [piece for piece in pieces if piece.text]


def _leaves(value: Any) -> list[str]:
    """The keys and texts within a tool call's arguments, which are JSON text or already parsed."""
    if isinstance(value, str) and value[:1] in "{[":
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return [value]
    if isinstance(value, Mapping):
        return [text for key, item in value.items() if item is not None for text in (str(key), *_leaves(item))]
    if isinstance(value, list):
        return [text for item in value for text in _leaves(item)]
    return [value.strip()] if isinstance(value, str) else []


def _names(tools: Any) -> list[str]:
    tools = json.loads(tools) if isinstance(tools, str) else tools or []
    functions = [tool.get("function") or tool for tool in tools if isinstance(tool, Mapping)]
    return [function["name"] for function in functions if function.get("name")]


def _places(text: str, rendered: str, occupied: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The unoccupied spans in which a text occurs, as it is or as JSON or Python writes it."""
    written = json.dumps(text, ensure_ascii=False), json.dumps(text), repr(text)
    for form in dict.fromkeys((text, *(spelling[1:-1] for spelling in written))):
        for match in re.finditer(re.escape(form), rendered):
            start, end = match.span()
            if all(end <= first or start >= last for first, last in occupied):
                yield start, end
