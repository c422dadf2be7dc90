"""Messages in the form that chat templates read: roles, contents, tool calls, and images in parts."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmkd.errors import UserError, nearest

from .columns import ROLES
from .image_columns import stored_image
from .images import content_of_text, decoded_base64
from .recordings import PARTS, advice

Message = dict[str, Any]

ROLE_NAMES = {
    **{name: "user" for name in ("human", "prompter")},
    **{name: "assistant" for name in ("gpt", "chatgpt", "bing", "bard", "bot", "model", "ai")},
    **{name: "tool" for name in ("observation", "function", "function_response", "tool_response", "ipython")},
}
"""Names of roles in other formats -> roles of chat templates. `function_call` is an assistant's turn with a call."""

CALL_ROLES = ("function_call", "tool_call")
IMAGE_MARK = "<image>"
"""The mark for an image within a text in LLaVA's files."""

CONTENT_KEYS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Keys of a message, besides `content`, with text that a model writes."""

_SPEAKER = ("role", "from", "speaker")
_SAID = ("content", "value")
_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image", "image_url", "input_image")
_PICTURE_KEYS = ("image", "image_url", "url", "path", "base64", "bytes", "data")
# LLaVA puts its mark on a line of its own; elsewhere "<image>" may be ordinary text, for example about HTML or XML.
_LLAVA_LINE = re.compile(r"\A<image>\n|\n<image>\Z")


@dataclass
class RowImages:
    """The images of one row: those of its image column and those within its messages."""

    exist: bool = False
    """Whether the rows have a column of images."""
    count: int = 0
    """The number of images in the column in this row."""
    read: Callable[[], Sequence[Any]] = list
    """Reads the images of the column, lazily: they may be large, and most rows need only their number."""
    folders: tuple[Path, ...] = ()
    """The folders in which relative paths within messages are looked up; by default the current folder."""
    brought: list[dict[str, Any]] = field(default_factory=list)
    """The images within messages as `datasets` stores them: bytes or a path."""
    places: list[bool] = field(default_factory=list)
    """For each image part in order, whether it contains its image."""

    def place(self, value: Any = None, *, is_base64: bool = False) -> None:
        """Adds an image part with its image, or without one for the next image of the column."""
        self.places.append(value is not None)
        if value is not None:
            self.brought.append(stored(value, self.folders, is_base64=is_base64))

    def merged(self) -> list[Any] | None:
        """The row's images in the order of its parts, or None if they are those of the column.

        Raises UserError if parts and column contradict each other.
        """
        if not self.brought:
            return None
        column = list(self.read()) if self.count else []
        if not column and all(self.places):
            return self.brought
        if all(self.places) and len(column) == len(self.brought):
            # The examples of some cookbooks give the same images in the column and in the messages.
            if all(_same(a, stored(b, self.folders)) for a, b in zip(self.brought, column, strict=True)):
                return None
        elif self.places.count(False) == len(column):
            brought, unnamed = iter(self.brought), iter(column)
            return [next(brought) if own else stored(next(unnamed), self.folders) for own in self.places]
        raise UserError(
            f"its messages bring {len(self.brought)} images in {len(self.places)} places, and its image column has "
            f"{len(column)} others. Name every image once: in the column, or in the messages"
        )


def stored(value: Any, folders: Sequence[Path] = (), *, is_base64: bool = False) -> dict[str, Any]:
    """An image as `datasets` stores it, {bytes, path}, undecoded.

    Raises UserError for a value that cannot be an image.
    """
    if isinstance(value, Mapping):
        entry = next(((key, value[key]) for key in _PICTURE_KEYS if value.get(key) is not None), None)
        if entry is None:
            raise UserError(
                f"an image is given as an object with the keys {', '.join(map(str, value))}, none of them known"
            )
        if value.get("bytes") is not None:
            return {"bytes": value["bytes"], "path": value.get("path")}
        return stored(entry[1], folders, is_base64=entry[0] in ("base64", "data"))
    image = stored_image(value)
    text = image["path"]
    if image["bytes"] is not None or ("://" in text and not text.startswith(("data:", "file:"))):
        return image
    content = decoded_base64(text) if is_base64 and not text.startswith("data:") else content_of_text(text)
    if isinstance(content, bytes):
        return {"bytes": content, "path": None}
    return {"bytes": None, "path": _placed(str(content), folders)}


def _placed(path: str, folders: Sequence[Path]) -> str:
    if "://" in path or Path(path).is_absolute() or not folders:
        return path
    places = [folder / path for folder in folders]
    return str(next((place for place in places if place.is_file()), places[0]))


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    if a["bytes"] is not None and b["bytes"] is not None:
        return a["bytes"] == b["bytes"]
    if a["path"] is not None and b["path"] is not None:
        # `datasets` keeps only the name of a file whose bytes it has read.
        return Path(a["path"]).name == Path(b["path"]).name if a["bytes"] or b["bytes"] else a["path"] == b["path"]
    bytes_, path = a["bytes"] or b["bytes"], a["path"] or b["path"]
    return path is not None and Path(path).is_file() and Path(path).read_bytes() == bytes_


def canonical_messages(messages: Any, pictures: RowImages, *, nulls: bool, column: str = "messages") -> list[Message]:
    """Messages with `role`, `content` and all their other keys, in the form that chat templates read.

    Images of parts are moved to `pictures`, leaving `{"type": "image"}`. Arguments of tool calls become objects. With
    `nulls`, null keys count as absent: Arrow adds them where messages of a data set have different keys. Raises
    UserError for values that are not messages, for unknown roles, and for parts that are neither text nor image.
    """
    if messages is None:
        return []
    if isinstance(messages, str):
        messages = _from_json(messages, column)
    if isinstance(messages, Mapping) or not isinstance(messages, Iterable):
        raise UserError(f"{column} is {_kind(messages)}, not a list of messages")
    return [_message(message, f"{column}[{i}]", pictures, nulls) for i, message in enumerate(messages)]


def _message(message: Any, where: str, pictures: RowImages, nulls: bool) -> Message:
    if not isinstance(message, Mapping):
        raise UserError(f"{where} is {_kind(message)}, not an object with role and content")
    speaker = next((key for key in _SPEAKER if message.get(key) is not None), None)
    if speaker is None:
        raise UserError(f"{where} has no role; its keys are {', '.join(map(str, message))}")
    content_key = next((key for key in _SAID if key in message), None)
    entries = {
        key: without_nulls(value) if nulls else value
        for key, value in message.items()
        if key not in (speaker, content_key) and value is not None
    }
    role = _role(message[speaker], where)
    weight = entries.get("weight", 1)
    if role in ("assistant", *CALL_ROLES) and (isinstance(weight, str) or weight not in (0, 1)):
        raise UserError(f"{where}.weight is {weight!r}; it must be 1, or 0 for a turn that is not learnt from")
    content = None if content_key is None else _content(message[content_key], where, pictures, nulls)
    if role in CALL_ROLES:
        return {"role": "assistant", "content": "", "tool_calls": _calls(content, where), **entries}
    if entries.get("tool_calls") is not None:
        entries["tool_calls"] = _decoded_calls(entries["tool_calls"], where)
        if not entries["tool_calls"]:
            # Some templates only test whether the key exists.
            del entries["tool_calls"]
    if content_key is None and not entries:
        raise UserError(f"{where} has no content; its only key is {speaker}")
    if content_key is None and not ({"tool_calls", "function_call"} & entries.keys()):
        raise UserError(f"{where} has no content; its keys are {', '.join(map(str, message))}")
    return {"role": role, **({} if content_key is None else {"content": content}), **entries}


def _role(name: Any, where: str) -> str:
    role = str(name).strip().lower()
    role = ROLE_NAMES.get(role, role)
    if role not in ROLES and role not in CALL_ROLES:
        known = [*ROLES, *ROLE_NAMES, *CALL_ROLES]
        raise UserError(
            f"{where} has the role {name!r}, which no chat template knows (did you mean {nearest(role, known)!r}?). "
            f"The roles are {', '.join(ROLES)}; in a data recipe, map others with role_map"
        )
    return role


def _content(content: Any, where: str, pictures: RowImages, nulls: bool) -> Any:
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, Iterable):
        raise UserError(f"{where}.content is {_kind(content)}; it must be text or a list of parts")
    return [_part(part, f"{where}.content[{i}]", pictures, nulls) for i, part in enumerate(content)]


def _part(part: Any, where: str, pictures: RowImages, nulls: bool) -> Message:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise UserError(f"{where} is {_kind(part)}, not a part such as {{type: text, text: ...}}")
    entries = {key: without_nulls(item) if nulls else item for key, item in part.items() if item is not None}
    picture = next((key for key in _PICTURE_KEYS if key in entries), None)
    kind = entries.pop("type", None) or ("text" if "text" in entries else "image" if picture else None)
    if kind in _TEXT_PARTS:
        return {"type": "text", "text": entries.pop("text", ""), **entries}
    if kind in _IMAGE_PARTS:
        value = None if picture is None else entries.pop(picture)
        pictures.place(value, is_base64=picture in ("base64", "data"))
        # `detail` is a setting of OpenAI's API; no chat template reads it.
        return {
            "type": "image",
            **{key: item for key, item in entries.items() if key not in (*_PICTURE_KEYS, "detail", "text")},
        }
    if kind in PARTS:
        raise UserError(f"{where} is of type {kind!r}, and {advice(PARTS[kind])}", because="not built")
    raise UserError(
        f"{where} is of type {kind!r}, but only text and image can be trained on. Leave such rows out, or put it in a "
        "text part (thoughts belong in the message's reasoning_content, calls in its tool_calls)"
    )


def _calls(content: Any, where: str) -> list[Any]:
    """The tool calls of a turn of ShareGPT, which writes them as JSON text."""
    value = _from_json(content, where) if isinstance(content, str) else content
    calls = value if isinstance(value, list) else [value]
    return _decoded_calls(
        [call if "function" in call else {"type": "function", "function": call} for call in calls], where
    )


def _decoded_calls(calls: Any, where: str) -> list[Any]:
    """Tool calls with arguments as objects: OpenAI writes JSON text, which templates would quote once more."""
    if isinstance(calls, str):
        calls = _from_json(calls, f"{where}.tool_calls")
    if isinstance(calls, Mapping) or not isinstance(calls, Iterable):
        raise UserError(f"{where}.tool_calls is {_kind(calls)}, not a list of calls")
    return [_decoded_call(call) for call in calls]


def _decoded_call(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _decoded_call(call["function"])}
    if not isinstance(call.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(call["arguments"])
    except json.JSONDecodeError:
        # Arguments that are not JSON are kept: a model may be trained to write another format.
        return dict(call)
    return {**call, "arguments": arguments if isinstance(arguments, dict) else call["arguments"]}


def canonical_tools(tools: Any, *, nulls: bool) -> list[Any] | None:
    """Descriptions of tools as a list, parsed if they are JSON text; None if there are none.

    Raises UserError for other values.
    """
    if isinstance(tools, str):
        tools = _from_json(tools, "tools") if tools.strip() else None
    if isinstance(tools, Mapping):
        tools = [tools]
    if tools is None:
        return None
    if not isinstance(tools, Iterable):
        raise UserError(f"tools is {_kind(tools)}, not a list of descriptions of functions")
    return [without_nulls(tool) if nulls else tool for tool in tools] or None


def in_parts(messages: Sequence[Message], images: int, mark: str | None = None) -> list[Message]:
    """The messages with content in parts; images are placed at their marks, or before the first question."""
    result = []
    unmarked = images if mark is None else 0
    for message in messages:
        parts: list[Message] = []
        if message["role"] == "user" and unmarked:
            parts, unmarked = [{"type": "image"}] * unmarked, 0
        content = message.get("content")
        texts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        for part in texts:
            parts += _split(part, mark) if part["type"] == "text" else [part]
        result.append({**message, "content": parts} if "content" in message else message)
    return result


def _split(part: Message, mark: str | None) -> list[Message]:
    if mark is None:
        return [part]
    parts: list[Message] = []
    pieces = part["text"].split(mark)
    for number, piece in enumerate(pieces):
        if number:
            parts.append({"type": "image"})
        # LLaVA writes marks on lines of their own; the separator between image and text is the template's business.
        text = piece.strip("\n")
        if text or len(pieces) == 1:
            parts.append({**part, "text": text})
    return parts


def flat(messages: Sequence[Message]) -> list[Message]:
    """The messages with text parts joined to one text, which the templates of language models expect."""
    return [
        {**message, "content": "\n".join(part["text"] for part in message["content"])}
        if isinstance(message.get("content"), list)
        and all(part.keys() == {"type", "text"} for part in message["content"])
        else message
        for message in messages
    ]


def texts_of(message: Mapping[str, Any]) -> list[str]:
    """The texts of a message's content."""
    content = message.get("content")
    if isinstance(content, list):
        return [part["text"] for part in content if part["type"] == "text"]
    return [] if content is None else [content]


def marks_images(messages: Iterable[Message]) -> bool:
    """Whether a user message has LLaVA's image mark on a line of its own."""
    return any(
        text == IMAGE_MARK or _LLAVA_LINE.search(text)
        for message in messages
        if message["role"] == "user"
        for text in texts_of(message)
    )


def is_learnt(message: Mapping[str, Any]) -> bool:
    """Whether a message is a turn of the assistant to learn from; in OpenAI's format, weight 0 excludes a turn."""
    return message.get("role") == "assistant" and message.get("weight") != 0


def has_content(message: Message) -> bool:
    """Whether a message is not empty: it has text, an image, a tool call or reasoning."""
    content = message.get("content")
    if isinstance(content, str):
        filled = bool(content.strip())
    else:
        filled = any(part["type"] == "image" or part["text"].strip() for part in content or [])
    return filled or any(message.get(key) for key in CONTENT_KEYS)


def missing(row: Mapping[str, Any]) -> str | None:
    """What a row in TRL's columns lacks for training, as text that continues "2 rows ..."; None for nothing."""
    for column in ("text", "prompt", "completion", "messages"):
        if column not in row:
            continue
        value = row[column]
        # An empty prompt is allowed: the completion is then text from its beginning.
        blank = isinstance(value, str) and column != "prompt" and not value.strip()
        if value is None or blank or (isinstance(value, list) and not value):
            return f"without {column}"
        lack = None if isinstance(value, str) else _lack(value, column != "prompt")
        if lack is not None:
            return lack
    return None


def _lack(messages: Sequence[Message], answered: bool) -> str | None:
    for message in messages:
        if message["role"] == "user" and not has_content(message):
            return "with an empty message of a user"
        if message.get("content") is None and not has_content(message):
            return "with a message without content"
    answers = [message for message in messages if message["role"] == "assistant"]
    if answered and not any(map(has_content, answers)):
        return "without an answer" if answers else "without a turn of the assistant"
    return None


def without_nulls(value: Any) -> Any:
    """The value without null keys, which Arrow adds where objects of a column have different keys."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple | np.ndarray):
        return [without_nulls(item) for item in value]
    return value


def _from_json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name} is text that is not valid JSON ({error}): {text[:60]!r}") from error


def _kind(value: Any) -> str:
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return "nothing" if value is None else names.get(type(value), f"of type {type(value).__name__}")
