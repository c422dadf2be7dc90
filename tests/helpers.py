"""What tests import from one another."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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


def on_two_ranks(
    jobs: dict[str, dict[str, Any]], folder: Path, ranks: int = 2, **variables: str
) -> dict[str, list[dict[str, Any]]]:
    """What each of two gloo ranks, or more, saw of the jobs that `tests/trainers/two_ranks.py` trains in turn."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*torchrun, "--module", "tests.trainers.two_ranks", str(folder / "jobs.json"), str(folder)]
    root, variables = Path(__file__).parents[1], {**environment(), **variables}
    done = subprocess.run(command, timeout=280, cwd=root, env=variables, capture_output=True, text=True)
    # torchrun's own report comes last and says nothing.
    reason = "\n".join(line for line in done.stderr.splitlines() if line.startswith("[rank"))
    assert done.returncode == 0, (reason or done.stderr)[-3000:]
    saw = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    return {name: [rank[name] for rank in saw] for name in jobs}
