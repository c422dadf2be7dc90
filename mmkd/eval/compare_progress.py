"""What is shown while models are compared: which training runs, how long all will take, and nothing of each one."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from mmkd.seams.upstream_messages import handlers_writing_to
from mmkd.units import readable_time

LOG_NAME = "trainings.log"
"""File of a comparison's folder with everything that its trainings print."""


class ComparisonProgress:
    """A line when each training begins, and on a terminal a bar of all of them.

    Args:
        folder: of the comparison, where the output of the trainings goes.
        what: what is run, such as "training".
        console: where lines are printed; by default standard error.
    """

    def __init__(self, folder: Path, what: str = "training", console: Console | None = None):
        self.folder, self.what, self.log = folder, what, folder / LOG_NAME
        self.console = Console(stderr=True) if console is None else console
        self._steps: list[int] = []
        self._number = 0
        self._seconds, self._done = 0.0, 0

    def begin(self, steps: Sequence[int], finished: int) -> None:
        """Says how many there are, with the optimizer steps of each, and how many an earlier session finished."""
        self._steps = list(steps)
        if finished:
            of = f"{finished} of {len(steps)}" if finished < len(steps) else f"All {len(steps)}"
            self.say(f"{of} {self.what}s are finished already and kept in {self.folder}.")
        if finished < len(steps):
            self.say(f"What the {self.what}s print goes to {self.log}.")

    @contextlib.contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Shows what runs inside; `count` is called after it."""
        place = f"{self.what} {self._number + 1} of {len(self._steps)}"
        line = f"{name}: {place}{self._left()}"
        if not self.console.is_terminal:
            self.say(line)
            with quiet(self.log):
                yield
            return
        columns = TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), TimeElapsedColumn()
        with Progress(*columns, console=self.console, transient=True) as bar:
            bar.add_task(line, total=sum(self._steps), completed=sum(self._steps[: self._number]))
            with quiet(self.log):
                yield

    def say(self, text: str) -> None:
        """Prints a line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def count(self, seconds: float | None) -> None:
        """Counts one that is finished, and how long it took where that is known."""
        if seconds is not None:
            self._seconds += seconds
            self._done += self._steps[self._number]
        self._number += 1

    def _left(self) -> str:
        """The time of what is not finished, at the speed of what is."""
        if not self._done:
            return ""
        left = sum(self._steps[self._number :]) * self._seconds / self._done
        return f", about {readable_time(left)} left"


@contextlib.contextmanager
def quiet(path: Path) -> Iterator[None]:
    """Sends to a file what is printed inside, messages of libraries among it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    moved: list[tuple[Any, Any]] = []
    with path.open("a", encoding="utf-8") as file:
        for handler in handlers_writing_to(sys.stderr, sys.__stderr__):
            moved.append((handler, handler.setStream(file)))
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            for handler, stream in moved:
                handler.setStream(stream)
