"""What training shows on a terminal and elsewhere."""

import contextlib
import os
import re
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pyte
import pytest
from datasets import Dataset
from transformers.trainer_callback import TrainerCallback

from mmkd.methods.kd import KDTrainer
from mmkd.methods.sft import SFTBaselineTrainer
from mmkd.training.log_lines import COLUMNS, evaluation_line, training_line
from mmkd.training.progress import TrainingProgress, phase
from mmkd.units import readable_time
from tests.helpers import Build

STEP = re.compile(r"step \d/4   loss [\d.]+ +kl [\d.]+ +agreement [\d.]+% +tokens/s [\d,]+ +left \d+ s")


class Terminal:
    """A pseudo-terminal in the place of standard output and standard error."""

    def __init__(self) -> None:
        self._master, slave = os.openpty()
        self.file = os.fdopen(slave, "w", buffering=1)
        self._parts: list[bytes] = []
        # A terminal that nobody reads is full after some thousand characters, and who writes to it waits.
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        # An error ends what a terminal says when its other side is closed.
        with contextlib.suppress(OSError):
            while part := os.read(self._master, 1 << 16):
                self._parts.append(part)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """In it, what is printed goes to the terminal; pytest sets both streams anew before a test."""
        with contextlib.redirect_stdout(self.file), contextlib.redirect_stderr(self.file):
            yield

    def written(self) -> str:
        """Everything that was written; nothing can be written after it."""
        self.file.close()
        self._reader.join()
        return b"".join(self._parts).decode()

    def close(self) -> None:
        self.written()
        os.close(self._master)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    yield terminal
    terminal.close()


def lines_of(written: str) -> list[str]:
    """What a user sees in the end."""
    screen = pyte.Screen(200, 60)
    pyte.Stream(screen).feed(written)
    return [line.rstrip() for line in screen.display if line.strip()]


@pytest.fixture(autouse=True)
def nothing_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingProgress, "explained", set())


class Speaker(TrainerCallback):
    """Says something during training, and fails where it should."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            print("a message of somebody", file=sys.stderr)
            if self.fails:
                raise RuntimeError("out of memory")


def test_a_terminal_has_a_status_line_and_a_line_per_log(build: Build, texts: Dataset, terminal: Terminal) -> None:
    trainer = build(KDTrainer, texts, disable_tqdm=False, trainer={"eval_dataset": texts.select(range(4))})
    trainer.add_callback(Speaker())
    with terminal.shown():
        with phase("stage 2 of 3, DFT"):
            trainer.train()
        trainer.evaluate()
    written = terminal.written()
    assert "\x1b[?25l" in written  # Was live ...
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")  # ... and has given the cursor back.
    assert "stage 2 of 3, DFT" in written
    assert "evaluating, batch 1/1" in written
    lines = lines_of(written)
    assert len([line for line in lines if STEP.fullmatch(line)]) == 4
    assert "a message of somebody" in lines
    assert len([line for line in lines if line.startswith("  kl ")]) == 1
    assert lines[-1].startswith("evaluation after step 4   loss ")
    assert not [line for line in lines if "{" in line or "━" in line]


def test_an_error_leaves_the_terminal_as_it_was(build: Build, texts: Dataset, terminal: Terminal) -> None:
    trainer = build(KDTrainer, texts, disable_tqdm=False)
    trainer.add_callback(Speaker(fails=True))
    with terminal.shown():
        with pytest.raises(RuntimeError):
            trainer.train()
        assert sys.stdout is sys.stderr is terminal.file
    written = terminal.written()
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_a_file_has_the_same_lines_and_no_status(
    build: Build, texts: Dataset, capsys: pytest.CaptureFixture[str], disable_tqdm: bool
) -> None:
    trainer = build(KDTrainer, texts, disable_tqdm=disable_tqdm, trainer={"eval_dataset": texts.select(range(4))})
    trainer.train()
    trainer.evaluate()
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\r" not in out
    lines = out.splitlines()
    assert len([line for line in lines if STEP.fullmatch(line)]) == 4
    assert lines[-1].startswith("evaluation after step 4   loss ")


def test_a_terminal_without_a_status_line_where_it_is_disabled(
    build: Build, texts: Dataset, terminal: Terminal
) -> None:
    trainer = build(KDTrainer, texts, disable_tqdm=True, max_steps=2)
    with terminal.shown():
        trainer.train()
    assert "\x1b[?25l" not in terminal.written()


def test_what_a_caller_logs_and_measures_is_shown(
    build: Build, texts: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = build(SFTBaselineTrainer, texts, trainer={"teacher": None}, max_steps=1)
    trainer.train()
    trainer.log({"reward": 0.5})
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "step 1   reward 0.5"
    (step,) = [line for line in lines if line.startswith("step 1/1 ")]
    assert re.search(r"loss [\d.]+ +accuracy [\d.]+%", step)
    line = evaluation_line(
        {"test_runtime": 70.0, "test_f1": 0.25, "test_accuracy": 0.5, "test_divergence": 1.0}, "test", 7
    )
    assert line == "test after step 7   accuracy 50.0%   f1 0.25   in 1 min 10 s"


def test_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress, args = TrainingProgress(), SimpleNamespace(output_dir="run")
    state = SimpleNamespace(is_world_process_zero=False, global_step=1, max_steps=2)
    progress.on_train_begin(args, state, None)
    progress.on_log(args, state, None, logs={"loss": 1.0})
    progress.on_prediction_step(args, state, None)
    assert capsys.readouterr() == ("", "")


def test_lines_have_the_same_columns() -> None:
    columns = ["loss", "kl", "top1_agreement"]
    whole = training_line({"loss": 1.25, "kl": 0.5, "top1_agreement": 0.125}, columns, 5, 1000, 3700)
    part = training_line({"loss": 10.0}, columns, 1000, 1000, 0)
    assert whole == "step    5/1000   loss 1.25      kl 0.5       agreement 12.5%    left 1 h 1 min"
    assert part == "step 1000/1000   loss 10        kl -         agreement -        left 0 s"


def test_every_column_has_a_meaning_and_every_alternative_exists() -> None:
    for name, column in COLUMNS.items():
        assert column.meaning, name
        assert COLUMNS.keys() >= set(column.but_not_beside), name


@pytest.mark.parametrize(
    "seconds, text", [(0, "0 s"), (59.6, "1 min"), (61, "1 min 1 s"), (3600, "1 h"), (7320, "2 h 2 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert readable_time(seconds) == text
