"""The log of a run on disk, line by line: it can be read while the run is going on."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback

from mmkd.files import write_file

LOG = "log.jsonl"
"""File of a run's folder with everything that was logged, one JSON object per line."""


class RunLog(TrainerCallback):
    """Writes each entry of the log as it is made. The Trainer itself writes them with a checkpoint, or at the end."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._began = (0, 0.0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the file with what the checkpoint knows, so that nothing after it stands there twice."""
        if not state.is_world_process_zero:
            return
        self._began = (state.global_step, time.monotonic(), time.process_time())
        self._path = Path(args.output_dir, LOG)
        write_file(self._path, "".join(_line(entry, state) for entry in state.log_history))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds the newest entry, in one write."""
        if self._path is not None and state.log_history:
            entry = state.log_history[-1]
            if "train_runtime" in entry:
                entry = {**entry, **self._per_step(state)}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(entry, state))

    def _per_step(self, state: Any) -> dict[str, float]:
        """What a step of this session took, by the clock and of all cores; runs on a shared machine differ in one."""
        first, seconds, spent = self._began
        steps = max(1, state.global_step - first)
        return {
            "step_runtime": (time.monotonic() - seconds) / steps,
            "step_cpu_runtime": (time.process_time() - spent) / steps,
        }


def logs_in(folder: Path) -> list[list[dict[str, Any]]]:
    """The logs of all trainings in a folder."""
    texts = [path.read_text(encoding="utf-8") for path in folder.rglob(LOG)]
    return [[json.loads(line) for line in text.splitlines()] for text in texts]


def hours_of_steps(folder: Path, processes: int = 1) -> float | None:
    """What the steps of all trainings in a folder took: hours of GPUs, or of cores; None if it is not known."""
    hours = 0.0
    for log in logs_in(folder):
        last = next((entry for entry in reversed(log) if "step_cpu_runtime" in entry), None)
        if last is None:
            return None
        cuda = torch.cuda.is_available()
        per_step = last["step_runtime"] * processes if cuda else last["step_cpu_runtime"]
        hours += last["step"] * per_step / 3600
    return hours


def _line(entry: dict[str, Any], state: Any) -> str:
    return json.dumps({**entry, "max_steps": state.max_steps}) + "\n"
