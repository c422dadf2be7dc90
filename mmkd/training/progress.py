"""What training shows: one short line per log, and on a terminal a status line below them."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column as TableColumn
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import has_length

from mmkd.seams.upstream_messages import handlers_writing_to
from mmkd.units import readable_time

from .log import LOG
from .log_lines import (
    cells,
    columns_of,
    evaluation_line,
    evaluation_prefix,
    legend,
    other_line,
    training_line,
    warnings_in,
)

_phase: ContextVar[str] = ContextVar("phase", default="")


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Names what the trainings inside are a part of, such as "stage 2 of 3, DFT"."""
    outer = _phase.get()
    token = _phase.set(f"{outer}, {name}" if outer else name)
    try:
        yield
    finally:
        _phase.reset(token)


def within_phase() -> bool:
    """Whether a training is a part of something larger."""
    return bool(_phase.get())


def show_progress(trainer: Trainer) -> "TrainingProgress | None":
    """Puts our lines in the place of the Trainer's own; a notebook keeps its table, and there is None."""
    for kind in (ProgressCallback, PrinterCallback):
        if any(type(callback) is kind for callback in trainer.callback_handler.callbacks):
            trainer.remove_callback(kind)
            progress = TrainingProgress(live=kind is ProgressCallback)
            trainer.add_callback(progress)
            return progress
    return None


class TrainingProgress(TrainerCallback):
    """Prints a line per log and per evaluation, and keeps a status line on a terminal. Only rank 0 prints.

    Args:
        live: whether there may be a status line; `disable_tqdm` says no.
    """

    explained: ClassVar[set[str]] = set()
    """The columns whose meaning was printed in this process, which runs several trainings in stages and rounds."""

    def __init__(self, live: bool = True) -> None:
        self._live = live
        self._status: Status | None = None
        self._columns: list[str] | None = None
        self._values = ""
        self._begun, self._first_step = time.monotonic(), 0
        self._predicted = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens the status line."""
        self._begun, self._first_step, self._columns, self._values = time.monotonic(), state.global_step, None, ""
        if state.is_world_process_zero:
            self._open(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts the step."""
        self._show(state)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Counts a batch of an evaluation, in the same line."""
        if not state.is_world_process_zero:
            return
        self._open(state)
        self._predicted += 1
        of = f"/{len(eval_dataloader)}" if has_length(eval_dataloader) else ""
        self._show(state, f"evaluating, batch {self._predicted}{of}")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Goes back to the training, or closes the line of an evaluation that stands alone."""
        self._predicted = 0
        self._show(state)

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """As after an evaluation."""
        self.on_evaluate(args, state, control)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Prints the line of a log."""
        if not state.is_world_process_zero or not logs or "train_runtime" in logs or warnings_in(logs):
            return
        prefix = evaluation_prefix(logs)
        if prefix is not None:
            self._print(evaluation_line(logs, prefix, state.global_step))
        elif "loss" in logs:
            self._print_training(logs, args, state)
        else:
            self._print(other_line(logs, state.global_step))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the status line away."""
        self.close()

    def close(self) -> None:
        """Takes the status line away, also after an error."""
        self._predicted = 0
        if self._status is not None:
            self._status.close()
            self._status = None

    def _print_training(self, logs: Mapping[str, Any], args: Any, state: Any) -> None:
        if self._columns is None:
            self._columns = columns_of(logs)
            if new := [name for name in self._columns if name not in self.explained]:
                self.explained.update(new)
                more = f"  Each log has more values: {Path(args.output_dir, LOG)}"
                self._print("\n".join([*legend(new), more]), style="dim")
        self._values = "  ".join(cell.strip() for cell in cells(logs, self._columns))
        self._print(training_line(logs, self._columns, state.global_step, state.max_steps, self._left(state)))
        self._show(state)

    def _print(self, text: str, style: str | None = None) -> None:
        console = Console() if self._status is None else self._status.lines
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    def _open(self, state: Any) -> None:
        if self._status is None and self._live:
            self._status = Status.on_terminal(state.max_steps, state.global_step)

    def _show(self, state: Any, doing: str = "") -> None:
        if self._status is not None:
            left = f"left {readable_time(self._left(state))}" if state.global_step > self._first_step else ""
            self._status.update(
                state.global_step, doing or _phase.get(), "  ".join(filter(None, (self._values, left)))
            )

    def _left(self, state: Any) -> float:
        """Seconds to the last step, at the speed of this training so far."""
        done = max(1, state.global_step - self._first_step)
        return (time.monotonic() - self._begun) / done * (state.max_steps - state.global_step)


class Status:
    """The status line of a terminal: what is going on, how far, and the newest values."""

    def __init__(self, terminal: Console, lines: Console, steps: int, step: int):
        self.lines = lines
        """Where lines are printed, so that they stand above it."""
        text = TableColumn(no_wrap=True, overflow="ellipsis")
        self._progress = Progress(
            TextColumn("[bold]{task.description}", table_column=text),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}", table_column=text, markup=False),
            console=terminal,
            transient=True,
            refresh_per_second=2,
        )
        self._task = self._progress.add_task("training", total=max(steps, 1), completed=step, values="")
        self._moved: list[tuple[Any, Any]] = []
        self._progress.start()
        self._move_messages()

    @classmethod
    def on_terminal(cls, steps: int, step: int) -> "Status | None":
        """The status line of the terminal that standard output or standard error is; None where neither is one."""
        lines = Console()
        if lines.is_terminal:
            return cls(lines, lines, steps, step)
        terminal = Console(stderr=True)
        return cls(terminal, lines, steps, step) if terminal.is_terminal else None

    def update(self, step: int, doing: str, values: str) -> None:
        """Shows where training stands."""
        self._progress.update(self._task, completed=step, description=doing or "training", values=values)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        for handler, stream in self._moved:
            handler.setStream(stream)
        self._progress.stop()

    def _move_messages(self) -> None:
        """Has messages of libraries printed above the line, and not into it: rich moves `sys.stderr` only."""
        for handler in handlers_writing_to(sys.__stderr__, sys.__stdout__):
            self._moved.append((handler, handler.stream))
            handler.setStream(sys.stderr)
