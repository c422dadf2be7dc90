"""Checkpoints with random damage: a training goes on from them as if nothing had been, or refuses them."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from mmkd.errors import UserError
from mmkd.methods.kd import KDTrainer
from mmkd.recipe.run import last_checkpoint, resume_point
from mmkd.training.checkpoint_files import CHECKSUMS
from tests.endurance.damage import Tally, copied, damage
from tests.helpers import Build, losses_of

KEYS: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "save_only_model": False}

STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


def ended(trainer: Any) -> tuple[list[float], list[tuple[str, list[float]]]]:
    """The losses of a training, and the weights that it ended with."""
    weights = {name: own.flatten().tolist() for name, own in trainer.model.state_dict().items()}
    return losses_of(trainer), sorted(weights.items())


@pytest.mark.parametrize("count", [pytest.param(40, id="short"), pytest.param(500, id="long", marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_refused_or_goes_on_as_before(
    count: int, build: Build, texts: Dataset, tmp_path: Path
) -> None:
    undisturbed = build(KDTrainer, texts, **KEYS)
    undisturbed.train()
    expected = ended(undisturbed)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert (checkpoint / CHECKSUMS).is_file()

    def gone_on(folder: Path) -> Any:
        trainer: Any = build(KDTrainer, texts, **KEYS, output_dir=str(folder.parent))
        trainer.args.resume_from_checkpoint = str(folder)
        trainer.train(resume_from_checkpoint=resume_point(trainer.args))
        return ended(trainer)

    tally = Tally(f"damaged checkpoints, seeds 0 to {count - 1}")
    for seed in range(count):
        chance = random.Random(seed)
        folder = copied(checkpoint, tmp_path / "damaged" / "checkpoint-2")
        files = tuple(path.name for path in folder.iterdir() if path.name != CHECKSUMS)
        # Without its checksums a checkpoint is one of an earlier version, of whose bytes nothing is known.
        what = damage(folder, chance, but=(CHECKSUMS,) if seed % 8 else files)
        tally.try_(seed, what, lambda folder=folder: gone_on(folder), expected.__eq__)
    tally.end()


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
@pytest.mark.parametrize("how", ["empty", "cut", "garbage"])
def test_without_checksums_a_broken_file_is_named_too(
    file: str, how: str, build: Build, texts: Dataset, tmp_path: Path
) -> None:
    build(KDTrainer, texts, **KEYS).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    (checkpoint / CHECKSUMS).unlink()
    content = (checkpoint / file).read_bytes()
    (checkpoint / file).write_bytes({"empty": b"", "cut": content[: len(content) // 2], "garbage": b"\x93" * 500}[how])
    trainer: Any = build(KDTrainer, texts, **KEYS)
    trainer.args.resume_from_checkpoint = str(checkpoint)
    with pytest.raises(UserError, match="checkpoint-2"):
        trainer.train(resume_from_checkpoint=resume_point(trainer.args))


def test_a_checkpoint_whose_state_is_no_text_is_not_the_newest(build: Build, texts: Dataset, tmp_path: Path) -> None:
    build(KDTrainer, texts, **KEYS).train()
    (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").write_bytes(b"\xff\xfe{")
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"


class Opened:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


@pytest.mark.parametrize("file", [*STATES, "pytorch_model.bin"])
def test_no_code_in_a_checkpoint_runs(file: str, build: Build, texts: Dataset, tmp_path: Path) -> None:
    """Neither beside checksums that fit, nor in the place of safetensors."""
    build(KDTrainer, texts, **KEYS).train()
    checkpoint, mark = tmp_path / "run" / "checkpoint-2", tmp_path / "ran"
    (checkpoint / CHECKSUMS).unlink()
    if file == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    torch.save(Opened(mark), checkpoint / file)
    trainer: Any = build(KDTrainer, texts, **KEYS)
    with pytest.raises(UserError, match="checkpoint-2"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert not mark.exists()
