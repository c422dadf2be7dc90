"""The log of a run on disk, line by line: it can be read while the run is going on."""

import json
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerCallback

from mmkd.files import write_file

LOG = "log.jsonl"
"""File of a run's folder with everything that was logged, one JSON object per line."""


class RunLog(TrainerCallback):
    """Writes each entry of the log as it is made. The Trainer itself writes them with a checkpoint, or at the end."""

    def __init__(self) -> None:
        self._path: Path | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the file with what the checkpoint knows, so that nothing after it stands there twice."""
        if not state.is_world_process_zero:
            return
        self._path = Path(args.output_dir, LOG)
        write_file(self._path, "".join(_line(entry, state) for entry in state.log_history))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds the newest entry, in one write."""
        if self._path is not None and state.log_history:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(state.log_history[-1], state))


def _line(entry: dict[str, Any], state: Any) -> str:
    return json.dumps({**entry, "max_steps": state.max_steps}) + "\n"
