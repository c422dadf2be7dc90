"""The baseline: trl's SFT loss through our step, with the teacher as a measure only."""

from typing import Any

import pytest
from datasets import Dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from mmkd.methods.sft import SFTBaselineConfig, SFTBaselineTrainer
from tests.helpers import Build, losses_of


def test_losses_are_those_of_trl(build: Build, completions: Dataset, tiny: Any, tmp_path: Any) -> None:
    ours = build(SFTBaselineTrainer, completions, trainer={"teacher": None})
    ours.train()
    config = SFTConfig(
        output_dir=str(tmp_path / "trl"),
        max_steps=4,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        logging_steps=1,
        bf16=False,
        report_to="none",
        save_strategy="no",
        max_length=64,
        use_cpu=True,
    )
    theirs = SFTTrainer(model=str(tiny["student"]), args=config, train_dataset=completions)
    theirs.train()
    for name in ("loss", "grad_norm"):
        assert losses_of(ours, name) == pytest.approx(losses_of(theirs, name), rel=1e-4)  # pyright: ignore[reportArgumentType]


def test_a_teacher_measures_and_does_not_teach(build: Build, texts: Dataset) -> None:
    alone = build(SFTBaselineTrainer, texts, trainer={"teacher": None})
    alone.train()
    watched = build(SFTBaselineTrainer, texts, trainer={"eval_dataset": texts})
    watched.train()
    assert losses_of(watched) == losses_of(alone)
    assert losses_of(watched, "kl")
    assert not losses_of(alone, "kl")
    assert watched.evaluate()["eval_kl"] > 0


def test_mixing_belongs_to_kd(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="use method kd to mix"):
        SFTBaselineConfig(output_dir=str(tmp_path), ce_weight=0.5, bf16=False)
