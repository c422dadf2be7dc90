"""The student as its own teacher: before training, as it is now, and averaged over the steps."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from mmkd.errors import UserError
from mmkd.methods.alm import ALMTrainer
from mmkd.methods.kd import KDTrainer
from mmkd.methods.taid import TAIDTrainer
from mmkd.teachers.self_teacher import SelfTeacher
from mmkd.teachers.several import SeveralTeachers
from mmkd.training.base import DistillationTrainer
from tests.helpers import LORA, Build, losses_of, steps


def own(trainer: DistillationTrainer) -> SelfTeacher:
    """The student of a trainer as a teacher."""
    (teacher,) = [part for part in [trainer.teacher] if isinstance(part, SelfTeacher)]
    return teacher


def itself(model: Any = None, **trainer: Any) -> dict[str, Any]:
    """The arguments of a trainer whose student teaches itself."""
    return {"teacher": "self", **({} if model is None else {"model": model}), **trainer}


@pytest.mark.parametrize("lora", [False, True])
def test_base_is_a_second_copy_of_the_student(build: Build, texts: Dataset, tiny: Any, lora: bool) -> None:
    """Dropout and all: bit for bit, since the teacher's pass draws no random numbers."""
    adapter = {"peft_config": LoraConfig(**LORA, lora_dropout=0.1)} if lora else {}
    runs = []
    for teacher in ("self", str(tiny["student"])):
        torch.manual_seed(0)
        # Cross-entropy moves the student, which would stay as it is for its own sake.
        trainer = build(KDTrainer, texts, trainer={"teacher": teacher, **adapter}, ce_weight=0.5)
        runs.append([*steps(trainer), *losses_of(trainer, "kl")])
    assert runs[0] == runs[1]
    assert losses_of(trainer, "kl")[0] == pytest.approx(0, abs=1e-6)
    assert losses_of(trainer, "kl")[-1] > 1e-4


def test_a_base_without_its_adapter_keeps_nothing(build: Build, texts: Dataset) -> None:
    trainer = build(KDTrainer, texts, trainer=itself(peft_config=LoraConfig(**LORA)), ce_weight=0.5)
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    trainer.train()
    assert not own(trainer).weights.kept
    assert {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad} == trainable


def test_live_never_differs(build: Build, texts: Dataset) -> None:
    trainer = build(KDTrainer, texts, trainer=itself(), self_teacher="live", ce_weight=0.5)
    trainer.train()
    assert losses_of(trainer, "kl") == pytest.approx([0] * 4, abs=1e-6)
    assert not own(trainer).weights.kept


@pytest.mark.parametrize("lora", [False, True])
def test_an_average_lies_between_live_and_base(build: Build, texts: Dataset, lora: bool) -> None:
    def kl_of(**keys: Any) -> list[float]:
        torch.manual_seed(0)
        adapter = {"peft_config": LoraConfig(**LORA)} if lora else {}
        trainer = build(KDTrainer, texts, trainer=itself(**adapter), ce_weight=0.5, **keys)
        steps(trainer)
        return losses_of(trainer, "kl")

    base, live = kl_of(self_teacher="base"), kl_of(self_teacher="live")
    assert kl_of(self_teacher="ema", ema_decay=1.0) == base
    assert kl_of(self_teacher="ema", ema_decay=0.0) == live
    between = kl_of(self_teacher="ema", ema_decay=0.5)
    assert live[-1] < between[-1] < base[-1]
    # Steps 1 to 3 learn from the first weights, which are averaged after the third alone.
    seldom = kl_of(self_teacher="ema", ema_decay=0.0, ema_every=3)
    assert seldom[:3] == base[:3]
    assert seldom[3] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("form", ["base", "ema"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(build: Build, texts: Dataset, form: str, lora: bool) -> None:
    keys = {"self_teacher": form, "ce_weight": 0.5, "save_strategy": "steps", "save_steps": 2}

    def trainer_of() -> DistillationTrainer:
        torch.manual_seed(0)
        adapter = {"peft_config": LoraConfig(**LORA)} if lora else {}
        return build(KDTrainer, texts, trainer=itself(**adapter), **keys)

    whole = trainer_of()
    whole.train()
    folder = whole.args.output_dir
    resumed = trainer_of()
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    assert losses_of(resumed, "kl") == losses_of(whole, "kl")
    assert losses_of(resumed) == losses_of(whole)


@pytest.mark.parametrize("cls", [TAIDTrainer, ALMTrainer])
def test_other_methods_have_the_student_as_teacher(build: Build, texts: Dataset, tiny: Any, cls: Any) -> None:
    """As they have a second copy of it."""
    losses = []
    for teacher in ("self", None):
        model = str(tiny["student"])
        given = {"model": model, "teacher": teacher or str(tiny["student"])}
        trainer = build(cls, texts, trainer=given, ce_weight=0.5, max_steps=3)
        losses.append(steps(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_one_of_several_is_the_student_itself(build: Build, texts: Dataset, tiny: Any) -> None:
    several = [SeveralTeachers({"big": str(tiny["teacher"]), "me": me}) for me in ("self", str(tiny["student"]))]
    ours, theirs = (steps(build(KDTrainer, texts, trainer={"teacher": teacher})) for teacher in several)
    assert ours == theirs
    routed = texts.add_column("who", ["big", "me", "me"] * 8)
    pairs = [
        SeveralTeachers({"big": str(tiny["teacher"]), "me": me}, column="who") for me in ("self", str(tiny["student"]))
    ]
    ours, theirs = (steps(build(KDTrainer, routed, trainer={"teacher": teacher})) for teacher in pairs)
    assert ours == theirs


def test_settings_of_a_self_that_does_not_teach_are_refused(build: Build, texts: Dataset) -> None:
    with pytest.raises(UserError, match="Set teacher: self"):
        build(KDTrainer, texts, self_teacher="live")
    with pytest.raises(UserError, match="self_teacher"):
        build(KDTrainer, texts, trainer=itself(), self_teacher="older")
