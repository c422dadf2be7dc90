"""Files of a run: lines of JSON, and copies of models."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mmkd.files import write_file
from mmkd.recipe.run_record import RECORD
from mmkd.training.log import LOG


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line."""
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file."""
    write_file(path, json.dumps(value, indent=1, ensure_ascii=False))


def read_json(path: Path) -> Any:
    """The content of a JSON file, None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def copy_model(source: Path, target: Path) -> None:
    """Copies a saved model without the checkpoints, the log and the record of its training."""
    target.mkdir(parents=True, exist_ok=True)
    left = (PREFIX_CHECKPOINT_DIR, "training_args", "optimizer", LOG, RECORD)
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(left):
            shutil.copyfile(path, target / path.name)
