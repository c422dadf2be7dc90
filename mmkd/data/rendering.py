"""What a chat template swallows of a row's messages, or adds to them: the row is compared with its rendering."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .messages import is_learnt

_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# Said by the template itself, or looked at part by part.
_KNOWN = {"role", "content", "tool_calls", "tool_call_id", "weight", *_THOUGHTS}
_SHOWN = 60


@dataclass(frozen=True)
class Swallowed:
    """A part of a message that its rendering lacks."""

    message: int
    what: str
    """Such as "the content of the user"."""
    text: str
    answer: bool
    """Whether the student was to learn it."""

    def __str__(self) -> str:
        shown = self.text if len(self.text) <= _SHOWN else self.text[:_SHOWN] + "..."
        return f"{self.what} in message {self.message} ({shown!r})"


@dataclass(frozen=True)
class _Piece:
    what: str
    text: str
    answer: bool = False


def swallowed(messages: Sequence[Mapping[str, Any]], tools: Any, rendered: str) -> list[Swallowed]:
    """The parts of a conversation that do not occur in what a template made of it, in their order.

    A template may strip white space, write JSON in its own way and move parts about. Thoughts before the last question
    are no answers: many templates leave them out on purpose, as their models do.
    """
    asked = max((place for place, one in enumerate(messages) if one.get("role") == "user"), default=-1)
    pieces = [
        (place, piece) for place, message in enumerate(messages) for piece in _pieces(message, learnt=place > asked)
    ]
    pieces += [(-1, _Piece("the tool", str(name))) for name in _names(tools)]
    taken: list[tuple[int, int]] = []
    missing = []
    # Long ones first, which short ones may be a part of.
    for place, piece in sorted(pieces, key=lambda one: -len(one[1].text)):
        span = next(_places(piece.text, rendered, taken), None)
        if span is None:
            missing.append(Swallowed(place, piece.what, piece.text, piece.answer))
        else:
            taken.append(span)
    return sorted(missing, key=lambda one: one.message)


def unknown_keys(messages: Iterable[Mapping[str, Any]], template: str) -> set[str]:
    """Keys with a value in some message that a template never names, so that it cannot write them."""
    keys = {key for message in messages for key, value in message.items() if value not in (None, "", [])}
    return {key for key in keys - _KNOWN if not re.search(rf"\b{re.escape(key)}\b", template)}


def added(rendered: str, messages: Sequence[Mapping[str, Any]]) -> str | None:
    """The words that a template puts before a conversation without a system message: a system prompt of its own."""
    if not messages or any(one.get("role") in ("system", "developer") for one in messages):
        return None
    texts = [piece.text for piece in _pieces(messages[0], learnt=True) if piece.text]
    before = rendered.split(texts[0])[0] if texts else ""
    # What is no sentence is markup: special tokens and the names of roles.
    sentences = [line.strip() for line in re.split(r"<[^<>\n]*>|\[[A-Z/_]+\]|\n", before)]
    told = [line for line in sentences if line.count(" ") >= 2]
    return " ".join(told) or None


def _pieces(message: Mapping[str, Any], learnt: bool) -> list[_Piece]:
    """What must occur of a message; `learnt` where its thoughts are a part of the answer too."""
    role = str(message.get("role"))
    answers = is_learnt(message)
    of = f"of the {role}"
    found = [
        _Piece(f"{key} {of}", text.strip(), answers and learnt)
        for key in _THOUGHTS
        if isinstance(text := message.get(key), str)
    ]
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    for text in (part.get("text") for part in parts if isinstance(part, Mapping)):
        if isinstance(text, str):
            thought, closed, said = text.rpartition("</think>")
            if closed:
                found.append(_Piece(f"the thought {of}", thought.split("<think>")[-1].strip(), answers and learnt))
            found.append(_Piece(f"the content {of}", said.strip(), answers))
    for call in message.get("tool_calls") or []:
        function = call.get("function") or call
        found.append(_Piece(f"the tool call {of}", str(function.get("name") or ""), answers))
        arguments = function.get("arguments")
        found += [_Piece(f"an argument of a tool call {of}", text, answers) for text in _leaves(arguments)]
    return [piece for piece in found if piece.text]


def _leaves(value: Any) -> list[str]:
    """The keys and texts inside of a tool call's arguments, which come as JSON or read already."""
    if isinstance(value, str) and value[:1] in "{[":
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return [value]
    if isinstance(value, Mapping):
        return [text for key, one in value.items() if one is not None for text in (str(key), *_leaves(one))]
    if isinstance(value, list):
        return [text for one in value for text in _leaves(one)]
    return [value.strip()] if isinstance(value, str) else []


def _names(tools: Any) -> list[str]:
    tools = json.loads(tools) if isinstance(tools, str) else tools or []
    functions = [tool.get("function") or tool for tool in tools if isinstance(tool, Mapping)]
    return [function["name"] for function in functions if function.get("name")]


def _places(text: str, rendered: str, taken: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Where a text occurs, as it is or as JSON or Python writes it, beside what is taken already."""
    written = json.dumps(text, ensure_ascii=False), json.dumps(text), repr(text)
    for form in dict.fromkeys((text, *(one[1:-1] for one in written))):
        for found in re.finditer(re.escape(form), rendered):
            start, end = found.span()
            if all(end <= first or start >= last for first, last in taken):
                yield start, end
