"""A recipe that is being written: its keys in sections, each with the reason for its value."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

_WIDTH = 100

SECTIONS = {
    "models": "Who teaches whom",
    "data": "Data",
    "method": "What is learnt",
    "memory": "What fits the device",
    "training": "Training",
    "logs": "Logs, evaluation and checkpoints",
}


@dataclass(frozen=True)
class Entry:
    """A key of the recipe."""

    section: str
    value: Any
    why: str


class Draft:
    """Keys in the order of their sections; setting a key again replaces it."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def set(self, section: str, key: str, value: Any, why: str = "") -> None:
        """Gives a key its value, with the sentence that stands above it."""
        assert section in SECTIONS
        self._entries[key] = Entry(section, value, why)

    @property
    def keys(self) -> dict[str, Any]:
        """The keys of the recipe."""
        return {
            key: entry.value
            for section in SECTIONS
            for key, entry in self._entries.items()
            if entry.section == section
        }

    def text(self, header: Sequence[str]) -> str:
        """The YAML, under a header of lines that are comments or empty."""
        lines = list(header)
        for section, title in SECTIONS.items():
            entries = {key: entry for key, entry in self._entries.items() if entry.section == section}
            if entries:
                lines += ["", f"# --- {title}"]
            for key, entry in entries.items():
                lines += [f"# {line}" for line in textwrap.wrap(entry.why, _WIDTH - 2)]
                lines.append(_line(key, entry.value))
        return "\n".join(lines) + "\n"


def _line(key: str, value: Any) -> str:
    text = yaml.safe_dump(value, allow_unicode=True, width=10_000, sort_keys=False, default_flow_style=True)
    # A document of a scalar alone ends in a line of dots.
    return f"{key}: {text.removesuffix(f'...{chr(10)}').strip()}"


def counted(rows: int) -> str:
    """A number of rows for a reader."""
    return "1 row" if rows == 1 else f"{rows:,} rows"
