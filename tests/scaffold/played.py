"""A terminal in which commands are played: what is typed goes in, and the screen that a user sees comes out."""

import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pexpect
import pyte

from tests.helpers import environment

PATIENCE = 240
"""Seconds until a screen that does not come is a failure; a slow machine is none."""


class Played:
    """One command on a terminal of 80 columns."""

    def __init__(self, folder: Path, *words: str, columns: int = 80, rows: int = 50) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=5000)
        self._stream = pyte.ByteStream(self.screen)
        self._columns = columns
        variables = {**environment(), "COLUMNS": str(columns), "LINES": str(rows), "TERM": "xterm-256color"}
        # Rich would ask these whether the terminal has colours.
        for name in ("NO_COLOR", "FORCE_COLOR", "INPUTRC"):
            variables.pop(name, None)
        self._child: Any = pexpect.spawn(
            sys.executable,
            ["-m", "mmkd.commands.main", *words],
            cwd=str(folder),
            env=variables,
            dimensions=(rows, columns),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.close(force=True)

    @property
    def lines(self) -> list[str]:
        """All lines from the start of the command, those that have scrolled away too."""
        above = ["".join(line[column].data for column in range(self._columns)) for line in self.screen.history.top]
        return [line.rstrip() for line in (*above, *self.screen.display)]

    @property
    def text(self) -> str:
        """The lines as a reader's eye joins them."""
        return " ".join(" ".join(self.lines).split())

    def wait(self, text: str) -> None:
        """Reads until a text stands on the screen."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.text:
            going_on = self._read() and time.monotonic() < deadline
            assert going_on or text in self.text, f"{text!r} never came:\n" + "\n".join(self.lines)

    def type(self, keys: str) -> None:
        """Presses keys."""
        self._child.send(keys)

    def end(self) -> int:
        """Reads to the end; the exit status."""
        deadline = time.monotonic() + PATIENCE
        while self._read():
            assert time.monotonic() < deadline, "\n".join(self.lines)
        self._child.close()
        return self._child.exitstatus

    def _read(self) -> bool:
        """Whether the command goes on."""
        try:
            self._stream.feed(self._child.read_nonblocking(65536, 1))
        except pexpect.TIMEOUT:
            pass
        except pexpect.EOF:
            return False
        return True
