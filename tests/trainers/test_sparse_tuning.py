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
from tests.helpers import Build, losses_of, tuned


@pytest.mark.parametrize("cls", [KDTrainer, SFTBaselineTrainer])
def test_only_the_share_that_moved_most_is_trained(
    build: Build, texts: Dataset, tiny: Any, tmp_path: Path, cls: Any
) -> None:
    name = tuned(tiny["student"], tmp_path / "tuned")
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


def test_two_ranks_train_the_weights_that_one_process_trains(
    build: Build, completions: Dataset, ranks: Any, tiny: Any, tmp_path: Path
) -> None:
    name = tuned(tiny["student"], tmp_path / "tuned")
    alone: Any = build(KDTrainer, completions, sparse_density=0.08, sparse_from=name, weight_decay=0.1, max_length=128)
    alone.train()
    expected = list(zip(losses_of(alone), losses_of(alone, "grad_norm"), strict=True))
    total = sum(float(weight.double().sum()) for weight in alone.model.parameters())
    for rank in ranks["kd sparse ddp"]:
        assert rank["steps"] == [pytest.approx(step, rel=1e-4) for step in expected]
        assert rank["weights"] == pytest.approx(total, rel=1e-5)
    # Files are of the first rank, and the difference has the places of the run by itself.
    ours, theirs = (
        load_file(folder / FILE) for folder in (Path(alone.args.output_dir), ranks["kd sparse ddp"][0]["folder"])
    )
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(theirs[key], ours[key], rtol=1e-3, atol=1e-5, msg=key)


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
