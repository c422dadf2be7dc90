"""The words of a command line as flags and what stands after each, whatever they mean."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Flag:
    """A word that begins with two dashes, and what follows up to the next one."""

    typed: str
    """Without what stands after `=`; empty for words before the first flag."""
    values: list[str]
    joined: bool
    """Whether the first value stands after `=`: it is then the only one."""

    @property
    def name(self) -> str:
        """The key, however its words are joined."""
        return self.typed.removeprefix("--").replace("-", "_")


def split_flags(flags: Sequence[str]) -> list[Flag]:
    """Each flag with the words after it."""
    read: list[Flag] = []
    for word in flags:
        if word.startswith("--"):
            typed, joined, value = word.partition("=")
            read.append(Flag(typed, [value] if joined else [], bool(joined)))
        else:
            if not read:
                read.append(Flag("", [], False))
            read[-1].values.append(word)
    return read
