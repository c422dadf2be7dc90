"""Tiny models, tokenizers and data that many tests share."""

import gc
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate.utils.memory as accelerate_memory
import pytest
import torch
from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from mmkd.precision import NATIVE_BF16
from mmkd.training.base import DistillationTrainer
from scripts.make_tiny_models import make_tiny_models, make_tokenizer, sentences
from tests.helpers import Build
from tests.schedule import FilesTogether, put_long_files_first

# Importing makes none, and looking for it again and again takes a tenth of the time: `frozen_imports` ends this.
gc.disable()

# What asks for bf16 gets it, so that a test means the same on every CPU; tests/test_precision.py sets it otherwise.
os.environ[NATIVE_BF16] = "1"

# Tables that commands print are as wide on every machine. Both sizes are given: with one alone, rich takes a dumb
# terminal for 80 columns wide.
os.environ.update(COLUMNS="200", LINES="50")
for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FilesTogether | None:
    return FilesTogether(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        put_long_files_first(items)


@pytest.fixture(autouse=True)
def _consoles_see_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # `map` of datasets in several processes replaces os.environ, and rich keeps the one it was imported with.
    monkeypatch.setattr(Console, "_environ", os.environ)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a tiny teacher and student with one vocabulary."""
    return make_tiny_models(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def texts() -> Dataset:
    return Dataset.from_dict({"text": sentences(24)})


@pytest.fixture
def chats() -> Dataset:
    pairs = zip(sentences(24, seed=1), sentences(24, seed=2), strict=True)
    return Dataset.from_list(
        [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in pairs]
    )


@pytest.fixture
def completions() -> Dataset:
    return Dataset.from_dict({"prompt": sentences(24, seed=3), "completion": [f" {s}" for s in sentences(24, seed=4)]})


@pytest.fixture
def build(tiny: dict[str, Path], tmp_path: Path) -> Build:
    """`build(TrainerClass, data, key=value, ...)`: a trainer of the tiny models; keys are fields of its config.

    `model`, `teacher` and other arguments of the constructor go in `trainer={...}`.
    """

    def build(
        cls: type[DistillationTrainer], data: Dataset, trainer: dict[str, Any] | None = None, **settings: Any
    ) -> DistillationTrainer:
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 4,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "bf16": False,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "max_length": 64,
        }
        config: Any = cls.config_class(**{**defaults, **settings})
        arguments = {"model": str(tiny["student"]), "teacher": str(tiny["teacher"]), **(trainer or {})}
        return cls(args=config, train_dataset=data, **arguments)

    return build


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def frozen_imports() -> None:
    """What all tests import lives as long as they do; looking for garbage in it took 0.3 s per model that is freed."""
    gc.collect()
    gc.freeze()
    gc.enable()
    # accelerate looks at the end of every training, which took 0.1 s; what is left is found by itself in time.
    accelerate_memory.gc = SimpleNamespace(collect=int)
