"""What a phase says while it runs: a bar with the time left on a terminal, one line at its end elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .reply_record import Advance


@contextmanager
def progress(console: Console, title: str, total: int) -> Iterator[Advance]:
    """A function that is told how many questions were answered in how many tokens."""
    done, spoken, start = 0, 0, time.monotonic()
    columns = [TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
    bar = Progress(*columns, TextColumn("{task.fields[speed]}"), console=console, disable=not console.is_terminal)
    task = bar.add_task(title, total=total, speed="")

    def advance(questions: int, tokens: int) -> None:
        nonlocal done, spoken
        done, spoken = done + questions, spoken + tokens
        speed = f"{spoken / max(1e-9, time.monotonic() - start):,.0f} tokens/s"
        bar.update(task, completed=done, speed=speed)

    with bar:
        yield advance
    if not console.is_terminal:
        seconds = time.monotonic() - start
        speed = f", {spoken:,} tokens, {spoken / max(1e-9, seconds):,.0f} tokens/s" if spoken else ""
        console.print(f"{title}: {done:,} in {seconds:.1f} s{speed}", highlight=False, markup=False)
