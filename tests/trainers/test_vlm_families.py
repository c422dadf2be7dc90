"""Vision-language models of other families as teacher and student: every loss is that of the models' own logits."""

from typing import Any

import pytest
import torch

from mmkd.losses.divergences import forward_kl
from mmkd.methods.kd import KDTrainer
from mmkd.methods.llava_kd import LLaVAKDTrainer
from mmkd.methods.taid import TAIDTrainer
from tests.families import FAMILIES, made, model_of
from tests.helpers import Build, losses_of
from tests.trainers.test_llava_kd import dense_terms, loss_and_gradients, one_batch
from tests.vlms import vision_rows

IMAGES = [1, 2, 0, 1]


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Any:
    return made(request.param)


def built(build: Build, cls: Any, family: Any, same: bool = False, **settings: Any) -> Any:
    make, processor = family
    models = {
        "model": model_of(make, 0),
        "teacher": model_of(make, 0 if same else 1),
        "processing_class": processor,
        "teacher_processing_class": processor,
    }
    defaults = {"assistant_only_loss": True, "max_length": None, "max_steps": 2}
    return build(cls, vision_rows(IMAGES), trainer=models, **{**defaults, **settings})


def test_llava_kd_is_that_of_logits_in_full(build: Build, family: Any) -> None:
    trainer = built(build, LLaVAKDTrainer, family, alpha=0.7, beta=0.9, gamma=0.5)
    batch = one_batch(trainer)
    images = batch.student.images
    assert images[:, 0].tolist() == [0, 1, 1, 3]
    assert int(images[:, 1].sum()) == int(batch.student.visual.sum())
    # At every place where the model puts a piece of an image, and not at the token that begins one.
    pieces = batch.student.inputs["input_ids"] == trainer.model.config.image_token_id
    assert torch.equal(batch.student.visual, pieces)
    terms = dense_terms(trainer, batch)
    expected = terms["reg"] + 0.7 * terms["res"] + 0.9 * terms["vis"] + 0.5 * terms["rel"]
    assert loss_and_gradients(trainer, batch)[0] == pytest.approx(expected.item(), rel=1e-4)


def test_kd_is_that_of_logits_in_full(build: Build, family: Any) -> None:
    trainer = built(build, KDTrainer, family)
    batch = one_batch(trainer)
    inputs = batch.student.inputs
    answer = batch["labels"][:, 1:] != -100
    student, teacher = (one(**inputs).logits[:, :-1][answer] for one in (trainer.model, trainer.teacher.model))
    expected = forward_kl(student.log_softmax(-1), teacher.log_softmax(-1)).mean()
    assert loss_and_gradients(trainer, batch)[0] == pytest.approx(expected.item(), rel=1e-4)


def test_taid_starts_at_the_student_and_moves(build: Build, family: Any) -> None:
    trainer = built(build, TAIDTrainer, family, max_steps=3)
    trainer.train()
    assert all(torch.isfinite(torch.tensor(losses_of(trainer))))
    moved = losses_of(trainer, "taid_t")
    assert moved[-1] > moved[0]


@pytest.mark.parametrize("cls", [KDTrainer, TAIDTrainer])
def test_a_student_that_is_the_teacher_has_no_loss(build: Build, family: Any, cls: Any) -> None:
    trainer = built(build, cls, family, same=True, max_steps=1)
    trainer.train()
    assert losses_of(trainer, "kl")[0] == pytest.approx(0, abs=1e-5)
