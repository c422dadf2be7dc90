"""Runs on disk without a training: a log, a record and, if wanted, a student."""

import json
import shutil
from pathlib import Path
from typing import Any


def make_run(
    folder: Path, student: Path | None = None, teacher: str | None = None, steps: int = 3, finished: bool = True
) -> Path:
    """The folder of a run of method kd whose log has `steps` lines of ten steps."""
    folder.mkdir(parents=True, exist_ok=True)
    if student is not None:
        for file in student.iterdir():
            shutil.copy(file, folder / file.name)
    data = {"name": "words", "license": None, "source": "json", "homepage": None}
    keys: dict[str, Any] = {"method": "kd", "teacher": teacher, "data": "words.yaml"}
    record = {"method": "kd", "recipe": "kd.yaml", "keys": keys, "data": data}
    times = {"started": "2026-01-01", "finished": "2026-01-02" if finished else None}
    (folder / "run.json").write_text(json.dumps({**record, **times}))
    (folder / "log.jsonl").write_text("")
    for step in range(1, steps + 1):
        log_step(folder, step)
    return folder


def log_step(folder: Path, step: int) -> None:
    """One more line in the log of a run of ten steps."""
    entry = {"loss": 3.0 / step, "kl": 1.0 / step, "eta_minutes": 10.0 - step, "step": step, "max_steps": 10}
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")
