"""A key of a recipe, and how a terminal shows it. Imports nothing heavy, so that `--help` can list keys."""

import re
import textwrap
from collections.abc import Collection
from dataclasses import MISSING, dataclass
from enum import Enum
from typing import Any

from rich.console import Console
from rich.text import Text

from mmkd.schema import Field

# Of a list of all keys; who asks for one key by a word reads all that there is about it.
_CHOICES = 12
# Longer lines are hard to read.
_WIDEST = 110


@dataclass(frozen=True)
class Key:
    """One key of a recipe."""

    name: str
    group: str
    """One of GROUPS."""
    field: Field | None
    """What it may hold; None for the keys that are no field of a dataclass."""
    help: str
    default: Any = MISSING
    """MISSING where it must be set."""
    is_own: bool = True
    """Whether mmkd or a method declares it, and not transformers or trl."""
    method: str = ""
    """The method that declares it; empty for what every method has."""
    unused: str = ""
    """Why a recipe of this method has no use for it; empty where it has."""

    @classmethod
    def of(cls, field: Any, checked: Field, group: str) -> "Key":
        """The key of a dataclass's field, and what that may hold."""
        default = field.default if field.default_factory is MISSING else field.default_factory()
        # argparse wants a % twice.
        text = " ".join(field.metadata.get("help", "").replace("%%", "%").split())
        return cls(field.name, group, checked, text, default)

    def matches(self, words: Collection[str]) -> bool:
        """Whether each of some words stands in its name, or begins a word of its description."""
        return all(
            word.lower() in self.name.lower() or re.search(rf"(?<!\w){re.escape(word)}", self.help, re.IGNORECASE)
            for word in words
        )


def default_text(value: Any) -> str:
    """A default as a recipe would have it."""
    if value is MISSING:
        return "required"
    value = value.value if isinstance(value, Enum) else value
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "not set"
    return str(value) if value != "" else '""'


def print_key(console: Console, key: Key, whole: bool) -> None:
    """Prints name, type and default, and what the key means; of keys that few set, that only where `whole`."""
    takes = "" if key.field is None else key.field.described(10**6 if whole else _CHOICES)
    default = default_text(key.default)
    facts = [takes, {"required": "required", "not set": ""}.get(default, f"default {default}")]
    name = key.name if key.name == "env" else f"--{key.name}"
    head = Text(_wrapped(console, f"{name}  {'; '.join(fact for fact in facts if fact)}", 2), "green")
    head.stylize("bold cyan" if key.is_own else "cyan", 2, 2 + len(name))
    lines = [head]
    if whole or key.group != "other":
        text = key.help if key.is_own or whole else _first_sentence(key.help)
        lines.append(Text(_wrapped(console, text, 6)))
    if key.unused:
        lines.append(Text(_wrapped(console, f"Not of use here: {key.unused}", 6), "yellow"))
    console.print(Text("\n").join(line for line in lines if line), soft_wrap=True)


def _wrapped(console: Console, text: str, indent: int) -> str:
    """The text in lines that fit the terminal, the first of them indented and the others by six columns."""
    return textwrap.fill(
        text,
        max(min(console.width, _WIDEST), 24),
        initial_indent=" " * indent,
        subsequent_indent=" " * 6,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[a-z)`'\]]\.)\s", text, maxsplit=1)[0]
