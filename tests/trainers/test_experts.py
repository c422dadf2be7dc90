"""Students that are mixtures of experts: the load-balancing loss is transformers' own, a mean over micro-batches."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from mmkd.methods.kd import KDTrainer
from tests.experts import FAMILIES, experts
from tests.forked import on_two_ranks
from tests.helpers import Build, losses_of
from tests.trainers.test_llava_kd import loss_and_gradients, one_batch


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_transformers(build: Build, texts: Dataset, tmp_path: Path, family: str) -> None:
    trainer: Any = build(KDTrainer, texts, {"model": experts(tmp_path, family)}, ce_weight=1.0)
    batch = one_batch(trainer)
    loss, found = loss_and_gradients(trainer, batch)
    trainer.model.zero_grad()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    expected = trainer.model(**inputs, output_router_logits=True)
    assert expected.aux_loss > 1
    assert loss == pytest.approx(expected.loss.item(), rel=1e-4)
    expected.loss.backward()
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)
    total, count = trainer._sums["train"]["aux_loss"]
    assert total / count == pytest.approx(expected.aux_loss.item(), rel=1e-4)


def test_without_a_coefficient_there_is_no_such_loss(build: Build, texts: Dataset, tmp_path: Path) -> None:
    model = {"model": experts(tmp_path)}
    trainer: Any = build(KDTrainer, texts, model, ce_weight=1.0, router_aux_loss_coef=0.0, max_steps=1)
    trainer.train()
    assert losses_of(trainer) == pytest.approx(losses_of(trainer, "ce"), rel=1e-4)
    assert not losses_of(trainer, "aux_loss")


def test_an_accumulated_batch_has_the_mean_of_its_parts(build: Build, texts: Dataset, tmp_path: Path) -> None:
    trainer: Any = build(KDTrainer, texts, {"model": experts(tmp_path)})
    rows = [trainer._prepare_inputs(trainer.data_collator([dict(trainer.train_dataset[row])])) for row in (0, 1)]

    def accumulated(*batches: Any) -> torch.Tensor:
        trainer.model.train().zero_grad()
        trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
        for batch in batches:
            signal = trainer.ask(batch)
            losses = trainer.forward(trainer.model, batch, partial(trainer.losses_of, signal=signal))
            (losses.totals["router"] / trainer._counts["router"]).backward()
        return torch.cat([p.grad.flatten() for n, p in trainer.model.named_parameters() if p.grad is not None])

    first, second = accumulated(rows[0]), accumulated(rows[1])
    torch.testing.assert_close(accumulated(*rows), (first + second) / 2, rtol=1e-4, atol=1e-7)


def test_evaluations_and_checkpointed_activations(build: Build, texts: Dataset, tmp_path: Path) -> None:
    model = {"model": experts(tmp_path)}
    plain: Any = build(KDTrainer, texts, model, max_steps=3, ce_weight=0.5, combine="gradmag")
    plain.train()
    saving: Any = build(
        KDTrainer, texts, model, max_steps=3, ce_weight=0.5, combine="gradmag", gradient_checkpointing=True
    )
    saving.train()
    for name in ("loss", "grad_norm", "aux_loss"):
        assert losses_of(saving, name) == pytest.approx(losses_of(plain, name), rel=1e-4)
    found = plain.evaluate(texts)
    mixed = 0.5 * (found["eval_divergence"] + found["eval_ce"]) + 0.5 * found["eval_aux_loss"]
    assert found["eval_loss"] == pytest.approx(mixed, rel=1e-4)


def expected_steps(build: Build, completions: Dataset, model: str) -> list[Any]:
    """Of one rank that takes as parts what two ranks take at a time."""
    alone: Any = build(
        KDTrainer,
        completions,
        {"model": model},
        max_length=128,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    alone.train()
    return list(zip(*(losses_of(alone, name) for name in ("loss", "grad_norm", "aux_loss")), strict=True))


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_losses_do_not_depend_on_ranks(build: Build, completions: Dataset, ranks: Any, mixture: str, how: str) -> None:
    expected = expected_steps(build, completions, mixture)
    for rank in ranks[f"kd experts {how}"]:
        found = [(*step, aux) for step, aux in zip(rank["steps"], rank["aux_loss"], strict=True)]
        assert found == [pytest.approx(step, rel=1e-3) for step in expected]


@pytest.mark.slow
def test_losses_do_not_depend_on_ranks_of_zero3(
    build: Build, completions: Dataset, tiny: dict[str, Path], mixture: str, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not among mmkd's dependencies")
    expected = expected_steps(build, completions, mixture)
    job = {"method": "kd", "how": "zero3", "student": mixture, "teacher": str(tiny["teacher"])}
    (seen,) = on_two_ranks({"job": job}, tmp_path, DS_ACCELERATOR="cpu").values()
    for rank in seen:
        assert rank["steps"][0] == pytest.approx(expected[0][:2], rel=1e-4)
        assert rank["aux_loss"] == pytest.approx([aux for *_, aux in expected], rel=5e-3)
