"""Whether a chat template says what the rows say: looked at in rendered rows, before a step is taken."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError
from transformers import ProcessorMixin
from trl.data_utils import is_conversational

from mmkd.data.rendering import MissingPart, added, missing_parts, unknown_keys
from mmkd.errors import UserError

from .turns import Turns, template_settings

LOOKED_AT = 256
"""Rows of a split that are rendered, spread over all of it."""

_DATES = ("%d %b %Y", "%d %B %Y", "%Y-%m-%d", "%B %d, %Y", "%d/%m/%Y")
_SHOWN = 3


@dataclass(frozen=True)
class TemplateReport:
    """What a chat template leaves out of the rows that were looked at, and puts into them."""

    rows: int = 0
    missing: Mapping[int, list[MissingPart]] = field(default_factory=dict)
    """Row -> what it lacks."""
    unknown: frozenset[str] = frozenset()
    """Keys of messages that the template never names."""
    added: str | None = None
    """A system prompt of the template's own."""
    date: str | None = None
    """Today, where the template writes it."""
    error: str | None = None
    """What of an answer is missing, of the first row in which that is so."""

    @property
    def warnings(self) -> list[str]:
        """What may not be meant, one sentence each."""
        sentences = []
        if self.missing:
            rows = "; ".join(f"row {row}: {lost[0]}" for row, lost in islice(self.missing.items(), _SHOWN))
            sentences.append(
                f"The chat template leaves out a part of {len(self.missing)} of {self.rows} rows: {rows}. If that is "
                "not meant, use a template that writes it (chat_template_path)."
            )
        if self.unknown:
            sentences.append(
                f"The chat template does not know these keys of messages, and leaves them out: "
                f"{', '.join(sorted(self.unknown))}. Use a template that writes them (chat_template_path), or remove "
                "them from the data."
            )
        if self.date is not None:
            sentences.append(
                f"The chat template writes today's date ({self.date}) into the rows: tomorrow they are others, and a "
                "cache of a teacher knows none of them. Use a template without it (chat_template_path)."
            )
        return sentences

    @property
    def note(self) -> str | None:
        """What the template adds on purpose, in a sentence."""
        return self.added and f"The chat template adds a system prompt to rows without one: {self.added!r}."


def look_at(rows: Any, turns: Turns, split: str) -> TemplateReport:
    """What the template does to rows of a split.

    Raises UserError, with the row's number, where it refuses a conversation.
    """
    template = turns.template or turns.processing_class.chat_template
    template = "\n".join(template.values()) if isinstance(template, dict) else template or ""
    looked, missing, unknown, system, date, wrong = 0, {}, set(), None, None, None
    today = [datetime.now().strftime(form) for form in _DATES] if "strftime_now" in template else []
    for number, row in _sample(rows):
        if not is_conversational(row):
            continue
        messages = [*(row.get("messages") or row["prompt"]), *(row.get("completion") or [])]
        settings = template_settings(row)
        parts = _in_parts(messages) if isinstance(turns.processing_class, ProcessorMixin) else messages
        try:
            rendered = turns.render(parts, settings)
        except TemplateError as error:
            raise UserError(f"Row {number} of the {split} data: the chat template refuses it: {error}.") from error
        lost = missing_parts(messages, settings.get("tools"), rendered)
        answer = next((part for part in lost if part.answer), None)
        if answer is not None and wrong is None:
            wrong = (
                f"Row {number} of the {split} data: the chat template leaves out what the student is to learn, "
                f"{answer}. Use a template that writes it (chat_template_path), or remove it from the data."
            )
        looked += 1
        if lost:
            missing[number] = lost
        unknown |= unknown_keys(messages, template)
        system = system or added(rendered, messages)
        date = date or next((day for day in today if day in rendered and day not in str(messages)), None)
    return TemplateReport(looked, missing, frozenset(unknown), system, date, wrong)


def _sample(rows: Any) -> Iterable[tuple[int, dict[str, Any]]]:
    """Rows with their numbers, without pictures, which no rendering needs."""
    if not isinstance(rows, Dataset):
        return ((number, dict(row)) for number, row in enumerate(islice(rows, LOOKED_AT)))
    shown = [name for name in rows.column_names if name not in ("image", "images")]
    step = -(-len(rows) // LOOKED_AT) or 1
    numbers = range(0, len(rows), step)
    return zip(numbers, map(dict, rows.select_columns(shown).select(numbers)), strict=True)


def _in_parts(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The messages as templates of processors take them."""
    return [
        {**message, "content": [{"type": "text", "text": text}]}
        if isinstance(text := message.get("content"), str)
        else message
        for message in messages
    ]
