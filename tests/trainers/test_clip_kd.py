"""Dual encoders that learn from others: losses, accumulation, ranks, families, resuming, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkd.losses.contrastive_losses import Targets, affinity, clip, feature_mse, icl, logit_kl, similarities, unit
from mmkd.models.pair_heads import pair_head
from mmkd.preparation.pair_batches import PairSampler
from tests.pairs import EVERY_TERM, captioned, clip_kd


def steps_of(trainer: Any) -> list[list[float]]:
    return [[entry["loss"], entry["grad_norm"]] for entry in trainer.state.log_history if "grad_norm" in entry]


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def first_batch(trainer: Any) -> dict[str, Any]:
    keys = list(PairSampler(len(trainer.train_dataset), trainer.pairs_per_step, 3))[: trainer.pairs_per_step]
    return trainer.collate([trainer.train_dataset[key] for key in keys])


def test_the_loss_is_that_of_its_terms(tmp_path: Path) -> None:
    trainer: Any = clip_kd(tmp_path, max_steps=1, **EVERY_TERM)
    batch = first_batch(trainer)
    student, teacher = trainer.student, trainer.teachers[""]
    raw = student.encode_images(batch["student"]["first"]), student.encode_texts(batch["student"]["second"])
    theirs = batch["teachers"][""]
    told = unit(teacher.encode_images(theirs["first"])), unit(teacher.encode_texts(theirs["second"]))
    assert raw[0].shape[1] != told[0].shape[1]
    ours, wanted = similarities(unit(raw[0]), unit(raw[1])), similarities(*told)
    head = pair_head(student, "")
    across = unit(head.images(raw[0])), unit(head.texts(raw[1]))
    expected = 0.7 * clip(ours, student.logit_scale, Targets.of(ours))
    expected = expected + 0.5 * logit_kl(ours, wanted, student.logit_scale, teacher.logit_scale)
    expected = expected + 0.1 * affinity(ours, wanted, 5.0, 5.0)
    expected = expected + 3.0 * feature_mse(*across, *told) + 0.4 * icl(*across, *told, head.scale)
    trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected.mean().item(), rel=1e-5)


@pytest.mark.parametrize("layout", [(2, 4), (1, 8)])
def test_accumulated_batches_are_whole_ones(layout: tuple[int, int], tmp_path: Path) -> None:
    runs = []
    for batch, accumulation in ((8, 1), layout):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer: Any = clip_kd(tmp_path, **sizes, **EVERY_TERM)
        trainer.train()
        runs.append((steps_of(trainer), weights(trainer.model)))
    assert len(runs[0][0]) == 3
    assert runs[0][0] == [pytest.approx(step, rel=1e-5) for step in runs[1][0]]
    for name, tensor in runs[0][1].items():
        torch.testing.assert_close(tensor, runs[1][1][name], atol=1e-6, rtol=1e-5, msg=name)


def test_a_teacher_is_learnt(tmp_path: Path) -> None:
    trainer: Any = clip_kd(tmp_path, {"eval_dataset": captioned(8)}, max_steps=30, optim="adamw_torch")
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    assert {"eval_image_to_text_recall", "eval_text_to_image_recall_teacher", "eval_clip_loss"} <= after.keys()
    assert after["eval_logit_kl_loss"] < 0.9 * before["eval_logit_kl_loss"]
