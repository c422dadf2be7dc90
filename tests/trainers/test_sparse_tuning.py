"""Sparse fine-tuning: what moves, what does not, and the difference on disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mmkd.errors import UserError
from mmkd.methods.kd import KDTrainer
from mmkd.methods.sft import SFTBaselineTrainer
from mmkd.training.sparse_tuning import FILE, chosen_weights
from tests.helpers import Build


def tuned(tiny: Any, folder: Path) -> str:
    """The student after a training of all weights."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny["student"])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("cls", [KDTrainer, SFTBaselineTrainer])
def test_only_the_share_that_moved_most_is_trained(
    build: Build, texts: Dataset, tiny: Any, tmp_path: Path, cls: Any
) -> None:
    name = tuned(tiny, tmp_path / "tuned")
    trainer: Any = build(cls, texts, sparse_density=0.08, sparse_from=name, max_steps=2, weight_decay=0.1)
    start = {key: weight.detach().clone() for key, weight in trainer.model.named_parameters()}
    trainer.train()
    changed = {key: weight.detach() != start[key] for key, weight in trainer.model.named_parameters()}
    share = sum(int(part.sum()) for part in changed.values()) / sum(part.numel() for part in changed.values())
    assert 0.06 < share <= 0.0801
    other: Any = AutoModelForCausalLM.from_pretrained(name)
    expected = chosen_weights(start, dict(other.named_parameters()), 0.08)
    assert all(not (changed[key] & ~expected[key]).any() for key in changed)
    # Student and difference are the same.
    difference = load_file(Path(trainer.args.output_dir) / FILE)
    for key, weight in trainer.model.named_parameters():
        again = start[key].flatten().clone()
        if f"{key}.places" in difference:
            again[difference[f"{key}.places"]] += difference[f"{key}.changes"]
        torch.testing.assert_close(again.view_as(weight), weight.detach(), rtol=0, atol=1e-6)


def test_the_share_is_of_all_weights_together() -> None:
    start = {"a": torch.zeros(10), "b": torch.zeros(5, 2)}
    moved = {"a": torch.arange(10.0), "b": -torch.arange(10.0, 20.0).view(5, 2)}
    chosen = chosen_weights(start, moved, 0.2)
    assert not chosen["a"].any()
    assert chosen["b"].flatten().tolist() == [False] * 6 + [True] * 4


def test_what_cannot_be_is_refused(build: Build, texts: Dataset, tiny: Any) -> None:
    with pytest.raises(UserError, match="go together"):
        build(KDTrainer, texts, sparse_density=0.1)
    with pytest.raises(UserError, match="none of them has moved"):
        build(KDTrainer, texts, sparse_density=0.1, sparse_from=str(tiny["student"]))
    with pytest.raises(UserError, match="no student of the same shape"):
        build(KDTrainer, texts, sparse_density=0.1, sparse_from=str(tiny["teacher"]))
