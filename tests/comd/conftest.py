"""A recipe of comd on tiny models, whose teacher is a chat server."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.make_tiny_models import sentences
from tests.teachers.conftest import served_teacher as served_teacher

Recipe = Callable[..., Path]
"""The `recipe` fixture: (key=value, ...) -> the path of a recipe."""


@pytest.fixture
def recipe(tmp_path: Path, tiny: dict[str, Path]) -> Recipe:
    """Twelve instructions of words, four held out, two rounds of two updates; keys are added or replaced."""

    def write(name: str = "recipe", **changed: Any) -> Path:
        rows = [
            {"question": question, "answer": answer}
            for question, answer in zip(sentences(16, seed=5, low=5), sentences(16, seed=6, high=6), strict=True)
        ]
        for split, part in (("train", rows[:12]), ("eval", rows[12:])):
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        data = {
            "source": "json",
            "data_files": {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "eval")},
            "splits": {"train": "train", "eval": "eval"},
            "columns": {"messages": {"user": "{question}", "assistant": "{answer}"}},
            "shuffle_seed": None,
        }
        (tmp_path / "data.yaml").write_text(yaml.safe_dump(data))
        keys = {
            "method": "comd",
            "student": str(tiny["student"]),
            "data": str(tmp_path / "data.yaml"),
            "output_dir": str(tmp_path / "run"),
            "rounds": 2,
            "new_instructions": 4,
            "answer_max_new_tokens": 8,
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1.0e-2,
            "max_length": 64,
            "bf16": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **changed,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in keys.items() if value is not None}))
        return path

    return write
