"""The code blocks of a page, and what its author says to the tests about them."""

import re
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

REASONS = {"needs a GPU", "needs the Hub", "needs several machines", "needs a server", "takes minutes"}
"""Why a block may be skipped: `<!-- test: skip REASON -->` stands before it."""

FILES = {"yaml", "json", "jsonl", "csv", "text", "python"}
"""Languages of blocks that are written to the file that their title names."""

_FENCE = re.compile(
    r"^(?P<indent> *)(?P<ticks>`{3,})(?P<language>[\w+-]*)(?P<info>[^\n]*)\n(?P<text>.*?)^(?P=indent)(?P=ticks) *$",
    re.MULTILINE | re.DOTALL,
)
_INSTRUCTION = re.compile(r"<!-- test: (?P<words>[^>]*?) *-->\s*\Z")
_FRONT_MATTER = re.compile(r"\A---\n(.*?)^---\n", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int
    """Of its first line, from 1."""
    title: str | None = None
    skip: str | None = None
    """Why it is not run."""
    output: bool = False
    """Whether it is what the block before it prints."""


@dataclass(frozen=True)
class PageText:
    """A page as the tests read it."""

    blocks: list[Block]
    settings: dict[str, Any] = field(default_factory=dict)
    """What its front matter says under `test`: `slow: true`, and keys that every training of the page gets."""


def read_page(path: Path) -> PageText:
    """The blocks of a page and its settings. Raises ValueError for an instruction that means nothing."""
    text = path.read_text(encoding="utf-8")
    front = _FRONT_MATTER.match(text)
    settings = (yaml.safe_load(front[1]) or {}).get("test", {}) if front else {}
    return PageText([_block(text, fence) for fence in _FENCE.finditer(text)], settings)


def _block(text: str, fence: re.Match[str]) -> Block:
    line = text.count("\n", 0, fence.start()) + 2
    title = re.search(r'title="([^"]*)"', fence["info"])
    instruction = _INSTRUCTION.search(text, 0, fence.start())
    skip, output = None, False
    if instruction is not None:
        words = instruction["words"]
        output = words == "output"
        skip = words.removeprefix("skip ") if words.startswith("skip ") else None
        if not output and skip not in REASONS:
            raise ValueError(
                f"line {line}: 'test: {words}' means nothing; write 'output', or 'skip' and one of {REASONS}"
            )
    content = textwrap.dedent(fence["text"])
    return Block(fence["language"], content, line, title[1] if title else None, skip, output)
