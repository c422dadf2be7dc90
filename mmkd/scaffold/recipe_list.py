"""The list of what ships, as a terminal or a pipe shows it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from mmkd.errors import UserError
from mmkd.shipped import KINDS, Summary, list_recipes, summary_of

_TITLES = {
    "trainers": "Recipes: mmkd-train NAME",
    "data_recipes": "Data: `data: NAME` in a recipe",
    "eval": "Suites and tasks: mmkd eval RUN --suite NAME",
}


@dataclass(frozen=True)
class Entry:
    """One shipped file."""

    kind: str
    name: str
    summary: Summary

    @property
    def path(self) -> str:
        """From the folder that all kinds lie in."""
        return f"{self.kind}/{self.name}"

    @property
    def short_name(self) -> str:
        """As the commands that use it take it."""
        name = self.name.removesuffix(".yaml")
        return name.removeprefix("suites/") if self.kind == "eval" else name

    def has(self, word: str) -> bool:
        """Whether it is about a word, in any case."""
        text = " ".join([self.path, self.summary.purpose, self.summary.hardware, *self.summary.first])
        return word.lower() in text.lower()


def entries_with(words: Sequence[str]) -> list[Entry]:
    """What ships and has all of these words, in any case. Raises UserError when nothing has."""
    entries = [
        entry
        for kind in KINDS
        for entry in (Entry(kind, name, summary_of(name, kind)) for name in list_recipes(kind))
        if all(entry.has(word) for word in words)
    ]
    if not entries:
        raise UserError(f"No recipe has the words {' '.join(words)}; use fewer. `mmkd recipes ls` lists all.")
    return entries


def lines_of(entries: Sequence[Entry]) -> Iterator[str]:
    """A line for each, its path first, for grep and awk."""
    width = max(len(entry.path) for entry in entries)
    for entry in entries:
        summary = entry.summary
        parts = [entry.path.ljust(width), summary.hardware.partition(",")[0].ljust(len("10 GPUs of 40 GB"))]
        yield "  ".join([*parts, summary.purpose, *(f"First: {command}" for command in summary.first)])


def print_blocks(entries: Sequence[Entry], console: Console) -> None:
    """Each in lines that fit the terminal."""
    for kind in dict.fromkeys(entry.kind for entry in entries):
        console.print(Text(f"\n{_TITLES[kind]}", style="bold underline"))
        for entry in (entry for entry in entries if entry.kind == kind):
            name = Text(f"\n{entry.short_name}", style="bold cyan")
            if entry.summary.hardware:
                name.append(f"  {entry.summary.hardware}", style="not bold green")
            console.print(name)
            console.print(Padding(Text(entry.summary.purpose), (0, 0, 0, 4)))
            for command in entry.summary.first:
                console.print(Padding(Text(f"first: {command}", style="dim"), (0, 0, 0, 4)))
    console.print(
        Text(
            "\n`mmkd recipes show NAME` prints one, `mmkd recipes cp NAME mine.yaml` copies it to edit, and "
            "`mmkd recipes ls WORD` lists fewer."
        )
    )
