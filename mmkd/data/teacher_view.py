"""What a teacher reads of a row in place of the student's prompt: a view of its own on the same answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from mmkd.errors import UserError
from mmkd.nested_keys import nested_keys

from .canonical import OURS
from .columns import template_columns
from .messages import Message, is_learnt, texts_of
from .prompts import text_of
from .templates import filled

PROMPT, ANSWER = "prompt", "answer"
"""The placeholders of a template that are no columns: what the student is asked, and the row's own answer."""

_SYSTEM = ("system", "developer")


@dataclass(frozen=True)
class TeacherView:
    """How the teacher reads a row: behind another prompt, and perhaps with other images.

    Raises UserError for a view that changes nothing, and for a template that cannot be filled.
    """

    system: str | None = None
    """The teacher's system message, in the place of the row's own."""
    template: str | None = None
    """The teacher's user turn. It holds `{prompt}`, `{answer}` and the columns."""
    columns: tuple[str, ...] = ()
    """Columns of the rows that the template reads."""
    images_column: str | None = None
    """The column with the teacher's images, in the place of the student's."""

    def __post_init__(self) -> None:
        if self.system is None and self.template is None and self.images_column is None:
            raise UserError(
                "teacher_view sets neither system, template nor images_column, so that the teacher would read what "
                "the student reads. Set one of them, or remove teacher_view."
            )
        taken = next((name for name in (*self.columns, self.images_column) if name in OURS), None)
        if taken is not None:
            raise UserError(
                f"teacher_view names the column {taken!r}, which holds what is trained on. In a template write "
                "{prompt} for what the student is asked and {answer} for the row's answer; other columns need other "
                "names."
            )
        self._check_template()

    def _check_template(self) -> None:
        if self.template is None:
            if self.columns:
                raise UserError(
                    f"teacher_view names the columns {', '.join(self.columns)}, but has no template to read them. Set "
                    "template, such as '{prompt}\\n\\nSolution: {" + self.columns[0] + "}', or remove columns."
                )
            return
        if not self.template:
            raise UserError("teacher_view.template is empty. Write the teacher's prompt, or remove it.")
        try:
            names = template_columns(self.template)
        except UserError as error:
            raise UserError(f"teacher_view.{error}") from error
        unknown = next((name for name in names if name not in (*self.columns, PROMPT, ANSWER)), None)
        if unknown is not None:
            raise UserError(
                f"teacher_view.template reads {{{unknown}}}, which is not among teacher_view.columns "
                f"({', '.join(self.columns) or 'none'}). Add it there, or write {{{PROMPT}}} for what the student is "
                f"asked or {{{ANSWER}}} for the row's answer."
            )
        unread = next((name for name in self.columns if name not in names), None)
        if unread is not None:
            raise UserError(
                f"teacher_view.columns names {unread!r}, which teacher_view.template does not read. Write "
                f"{{{unread}}} into the template, or remove it from columns."
            )

    @classmethod
    def of(cls, value: Any) -> Self | None:
        """The view that a recipe, a command line (as JSON) or Python gives; None for None.

        Raises UserError for a value that is no view.
        """
        if value is None or isinstance(value, cls):
            return value
        names = [field.name for field in fields(cls)]
        value = nested_keys("teacher_view", value, names, '{"system": "..."}')
        for name, own in value.items():
            if name != "columns" and not isinstance(own, str | None):
                raise UserError(f"teacher_view.{name} is {own!r:.60}, which is no text. Write one text, in quotes.")
        columns = value.get("columns") or ()
        columns = [columns] if isinstance(columns, str) else columns
        if not isinstance(columns, Sequence) or not all(isinstance(name, str) for name in columns):
            raise UserError(f"teacher_view.columns is {columns!r:.60}; write a list of names of columns.")
        return cls(**{**value, "columns": tuple(columns)})

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the teacher's prompts, as JSON can say it; part of a cache's identity."""
        facts = {"system": self.system, "template": self.template, "images_column": self.images_column}
        columns = {"columns": sorted(self.columns)} if self.columns else {}
        return {**{name: value for name, value in facts.items() if value is not None}, **columns}

    @property
    def reads(self) -> tuple[str, ...]:
        """The columns of rows that are read besides what is trained on."""
        return (*self.columns, *([] if self.images_column is None else [self.images_column]))

    def check(self, columns: Sequence[str], split: str) -> None:
        """Raises UserError where rows with these columns lack one that is read."""
        missing = next((name for name in self.reads if name not in columns), None)
        if missing is not None:
            told = (
                f" Write {{{ANSWER}}} for a row's own answer." if missing in ("answer", "output", "response") else ""
            )
            raise UserError(
                f"teacher_view reads the column {missing!r}, which the {split} rows do not have; they have "
                f"{', '.join(columns)}. Correct the name, or add the column to the data.{told}"
            )

    def rewrite(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row as the teacher reads it; its answer stays as it is.

        The template takes the place of the user's turn before the first answer that is learnt from, so that all of
        these stand behind it. In plain text without a prompt it stands before the text. Raises UserError for a row
        that has no such place.
        """
        row = dict(row)
        if self.images_column is not None:
            row["images"] = _as_list(row.get(self.images_column))
        if "messages" in row:
            first = next((place for place, turn in enumerate(row["messages"]) if is_learnt(turn)), 0)
            asked = self._rewritten(row["messages"][:first], row)
            return {**row, "messages": [*asked, *row["messages"][first:]]}
        if "prompt" in row and not isinstance(row["prompt"], str):
            return {**row, "prompt": self._rewritten(row["prompt"], row)}
        if self.system is not None:
            raise UserError(
                "teacher_view.system is a message of a conversation, and these rows are plain text. Write it into "
                "teacher_view.template.",
                because="meaning",
            )
        if self.template is not None and "prompt" in row:
            return {**row, "prompt": self._filled(row, row["prompt"])}
        if self.template is not None:
            return {**row, "text": self.prefix(row) + row["text"]}
        return row

    def prefix(self, row: Mapping[str, Any]) -> str:
        """What the teacher reads before a row of plain text, which has no prompt.

        Raises UserError for a view that speaks of one.
        """
        named = [] if self.template is None else [n for n in template_columns(self.template) if n not in self.columns]
        if self.system is not None or self.template is None or named:
            what = "system" if self.system is not None else f"{{{named[0]}}}" if named else "images_column alone"
            raise UserError(
                f"The rows are plain text without a prompt, where teacher_view knows a template of columns only, "
                f"which stands before the text; it has {what}. Write such a template, or map the data to prompt and "
                "completion.",
                because="meaning",
            )
        return filled(self.template, row)

    def _filled(self, row: Mapping[str, Any], prompt: str) -> str:
        assert self.template is not None
        return filled(self.template, {**self._values(row), PROMPT: prompt})

    def _values(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What the template reads besides the prompt. A column that others read too does not hide the answer."""
        return {ANSWER: answer_of(row), **{name: row[name] for name in self.columns}}

    def _rewritten(self, asked: Sequence[Message], row: dict[str, Any]) -> list[Message]:
        messages = [dict(message) for message in asked]
        in_parts = any(isinstance(message.get("content"), list) for message in messages)
        if self.template is not None:
            place = next((n for n in reversed(range(len(messages))) if messages[n]["role"] == "user"), None)
            if place is None:
                raise UserError(
                    "teacher_view.template takes the place of a user's turn, and a conversation has none before its "
                    "first answer. Set teacher_view.system alone, or leave such rows out."
                )
            messages[place]["content"] = self._turn(messages[place].get("content"), row)
        if self.images_column is not None:
            messages = _with_places(messages, len(row["images"]))
        if self.system is not None:
            content: Any = [{"type": "text", "text": self.system}] if in_parts else self.system
            if messages and messages[0]["role"] in _SYSTEM:
                messages[0]["content"] = content
            else:
                messages.insert(0, {"role": "system", "content": content})
        return messages

    def _turn(self, content: Any, row: Mapping[str, Any]) -> Any:
        """The content of the user's turn by the template; images stay where they are around the prompt."""
        assert self.template is not None
        if not isinstance(content, list):
            return self._filled(row, content or "")
        before, is_whole, after = self.template.partition(f"{{{PROMPT}}}")
        texts = "\n".join(texts_of({"content": content}))
        if not is_whole or f"{{{PROMPT}}}" in after:
            images = [part for part in content if part["type"] != "text"]
            return [*images, {"type": "text", "text": self._filled(row, texts)}]
        start, end = (filled(text, self._values(row)) for text in (before, after))
        parts = [dict(part) for part in content]
        if start and parts and parts[0]["type"] == "text":
            parts[0]["text"] = start + parts[0]["text"]
        elif start:
            parts.insert(0, {"type": "text", "text": start})
        if end and parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += end
        elif end:
            parts.append({"type": "text", "text": end})
        return parts


def answer_of(row: Mapping[str, Any]) -> str:
    """The text of a row's own answer: its completion, or the assistant's last turns."""
    turns = row["completion"] if row.get("completion") is not None else _last_turns(row.get("messages") or [])
    if isinstance(turns, str):
        return turns
    return "\n".join(text_of(turn.get("content")) for turn in turns if turn["role"] == "assistant")


def _last_turns(messages: Sequence[Message]) -> Sequence[Message]:
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[end:]


def _with_places(messages: list[Message], images: int) -> list[Message]:
    """The messages with places for so many images: their own, or else all before the last turn of the user."""
    parts = [part for message in messages for part in message.get("content") or [] if not isinstance(part, str)]
    if sum(part["type"] == "image" for part in parts) == images:
        return messages
    last = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=0)
    placed = []
    for number, message in enumerate(messages):
        content: Any = message.get("content") or []
        texts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts = [part for part in texts if part["type"] != "image"]
        own = [{"type": "image"}] * images if number == last else []
        placed.append({**message, "content": [*own, *texts]})
    return placed


def _as_list(images: Any) -> list[Any]:
    return [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
