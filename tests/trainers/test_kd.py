"""KD: every divergence trains, and each setting does what it says."""

import pytest
from datasets import Dataset

from mmkd.methods.kd import DIVERGENCES, KDTrainer
from tests.helpers import Build, losses_of


@pytest.mark.parametrize("divergence", list(DIVERGENCES))
def test_every_divergence_brings_the_student_nearer(build: Build, texts: Dataset, divergence: str) -> None:
    trainer = build(KDTrainer, texts, divergence=divergence, max_steps=20)
    trainer.train()
    kl = losses_of(trainer, "kl")
    assert kl[-1] < kl[0]


def test_cross_entropy_alone_is_sft(build: Build, texts: Dataset) -> None:
    trainer = build(KDTrainer, texts, ce_weight=1.0, max_steps=2)
    trainer.train()
    assert losses_of(trainer) == pytest.approx(losses_of(trainer, "ce"), rel=1e-4)


def test_loss_is_the_mix_of_its_terms(build: Build, texts: Dataset) -> None:
    trainer = build(KDTrainer, texts, ce_weight=0.3, temperature=2.0, max_steps=2)
    trainer.train()
    terms = zip(losses_of(trainer, "divergence"), losses_of(trainer, "ce"), strict=True)
    assert losses_of(trainer) == pytest.approx([0.7 * kd + 0.3 * ce for kd, ce in terms], rel=1e-4)


def test_temperature_leaves_the_reported_kl_alone(build: Build, texts: Dataset) -> None:
    warm, plain = (build(KDTrainer, texts, temperature=t, max_steps=1) for t in (4.0, 1.0))
    warm.train()
    plain.train()
    assert losses_of(warm, "kl") == pytest.approx(losses_of(plain, "kl"), rel=1e-4)
    assert losses_of(plain, "divergence") == pytest.approx(losses_of(plain, "kl"), rel=1e-4)
    assert losses_of(warm, "divergence")[0] != pytest.approx(losses_of(plain, "divergence")[0], rel=1e-2)


def test_kl_and_divergence_of_the_same_step_agree(build: Build, texts: Dataset) -> None:
    """`kl` is of the logged step alone, `divergence` the mean since the last log, as `loss` is."""
    each = build(KDTrainer, texts)
    each.train()
    assert not losses_of(each, "step_divergence")
    trainer = build(KDTrainer, texts, logging_steps=2)
    trainer.train()
    assert losses_of(trainer, "step_divergence") == pytest.approx(losses_of(trainer, "kl"), rel=1e-4)
    assert losses_of(trainer, "divergence") == pytest.approx(losses_of(trainer), rel=1e-2)
    assert losses_of(trainer, "kl") == pytest.approx(losses_of(each, "kl")[1::2], rel=1e-4)
