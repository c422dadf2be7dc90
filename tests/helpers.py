"""What tests import from one another."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mmkd.training.base import DistillationTrainer

Build = Callable[..., DistillationTrainer]
"""The `build` fixture: (trainer class, data, trainer={...}, key=value, ...) -> a trainer of the tiny models."""


VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
"""Sizes of a tiny CLIP vision tower."""


def losses_of(trainer: DistillationTrainer, name: str = "loss") -> list[float]:
    """What a trainer logged under a name, step by step."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def steps(trainer: DistillationTrainer) -> list[float]:
    """Loss and gradient norm of every step of a training that is run."""
    trainer.train()
    return [*losses_of(trainer), *losses_of(trainer, "grad_norm")]


def near(values: list[float]) -> Any:
    """What equals these but for rounding."""
    return pytest.approx(values, rel=1e-4)


def environment() -> dict[str, str]:
    """For processes that a test starts: mmkd can be imported, one thread, wide lines."""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


LORA: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def tuned(student: Path | str, folder: Path) -> str:
    """A student after a training of all weights, as far as `sparse_from` can tell."""
    model: Any = AutoModelForCausalLM.from_pretrained(student)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder)
    return str(folder)
