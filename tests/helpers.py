"""What tests import from one another."""

from collections.abc import Callable

from mmkd.trainers.base import DistillationTrainer

Build = Callable[..., DistillationTrainer]
"""The `build` fixture: (trainer class, data, trainer={...}, key=value, ...) -> a trainer of the tiny models."""


def losses_of(trainer: DistillationTrainer, name: str = "loss") -> list[float]:
    """What a trainer logged under a name, step by step."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]
