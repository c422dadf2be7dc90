"""A terminal in which commands are played: what is typed goes in, and the screen that a user sees comes out."""

import logging
import os
import pty
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import pexpect
import pexpect.fdpexpect
import pyte
import torch

from mmkd.commands.main import main

PATIENCE = 240
"""Seconds until a screen that does not come is a failure; a slow machine is none."""


class Played:
    """One command on a terminal of 80 columns, in a fork of this process, which spares importing torch every time."""

    def __init__(self, folder: Path, *words: str, columns: int = 80, rows: int = 50) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=5000)
        self._stream = pyte.ByteStream(self.screen)
        self._columns = columns
        self._status: int | None = None
        self._pid, terminal = pty.fork()
        if self._pid == 0:
            _be_a_command(folder, words, columns, rows)
        self._child: Any = pexpect.fdpexpect.fdspawn(terminal)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.close()
        if self._status is None:
            os.kill(self._pid, 9)
            os.waitpid(self._pid, 0)

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

    def answer(self, question: str, keys: str) -> None:
        """Presses keys once a text and then the prompt stand there: what is typed before is echoed elsewhere."""
        self.wait(question)
        deadline = time.monotonic() + PATIENCE
        while not self.line.endswith(">"):
            going_on = self._read() and time.monotonic() < deadline
            assert going_on, "\n".join(self.lines)
        self.type(keys)

    @property
    def line(self) -> str:
        """The line of the cursor."""
        return self.screen.display[self.screen.cursor.y].rstrip()

    def type(self, keys: str) -> None:
        """Presses keys."""
        self._child.send(keys)

    def end(self) -> int:
        """Reads to the end; the exit status."""
        deadline = time.monotonic() + PATIENCE
        while self._read():
            assert time.monotonic() < deadline, "\n".join(self.lines)
        self._status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return self._status

    def _read(self) -> bool:
        """Whether the command goes on."""
        try:
            self._stream.feed(self._child.read_nonblocking(65536, 1))
        except pexpect.TIMEOUT:
            pass
        except (pexpect.EOF, OSError):
            return False
        return True


def _be_a_command(folder: Path, words: tuple[str, ...], columns: int, rows: int) -> NoReturn:
    """What a shell would start; pytest's hands are taken off streams and logs."""
    status = 70
    try:
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        logging.getLogger().handlers.clear()
        os.environ.update(COLUMNS=str(columns), LINES=str(rows), TERM="xterm-256color", TOKENIZERS_PARALLELISM="false")
        os.chdir(folder)
        # A fork's first threads would make torch's pool of threads anew all at once, and one of them finds none.
        torch.set_num_threads(torch.get_num_threads())
        status = main(words)
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)
