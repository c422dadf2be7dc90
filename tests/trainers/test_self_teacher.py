"""The student as its own teacher: before training, as it is now, and averaged over the steps."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from trl.experimental.sdft.teacher_sync import SyncTeacherModelCallback

from mmkd.errors import UserError
from mmkd.methods.alm import ALMTrainer
from mmkd.methods.kd import KDTrainer
from mmkd.methods.llava_kd import LLaVAKDTrainer
from mmkd.methods.taid import TAIDTrainer
from mmkd.models.kept_weights import KeptWeights
from mmkd.teachers.self_teacher import SelfTeacher
from mmkd.teachers.several import SeveralTeachers
from mmkd.training.base import DistillationTrainer
from tests.helpers import LORA, Build, losses_of, steps
from tests.vlms import vision_rows


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
    with pytest.raises(UserError, match=r"self_teacher is ema, and the teacher is SelfTeacher\('live'\)"):
        build(KDTrainer, texts, trainer={"teacher": SelfTeacher("live")}, self_teacher="ema")


def test_an_average_moves_as_that_of_trl_does() -> None:
    """As the teacher of TRL's SDFT, whose update rate is what the student's weights have."""
    torch.manual_seed(0)
    Accelerator()
    ours, theirs = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    kept = KeptWeights(ours)
    kept.keep(summed=True)
    for _ in range(3):
        with torch.no_grad():
            ours.weight.add_(torch.randn_like(ours.weight))
            ours.bias.mul_(1.5)
        SyncTeacherModelCallback.sync_target_model(ours, theirs, 0.05)
        kept.follow(0.95)
    before = ours.weight.clone()
    with kept.in_use():
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    assert torch.equal(ours.weight, before)


def test_an_average_of_short_weights_does_not_stand_still() -> None:
    """In bfloat16 a step of less than 1/256 of a weight is rounded away."""
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    model.weight.data.fill_(1.0)
    kept = KeptWeights(model)
    kept.keep(summed=True)
    model.weight.data.fill_(1.0625)
    for _ in range(200):
        kept.follow(0.99)
    with kept.in_use():
        assert model.weight.dtype == torch.bfloat16
        assert model.weight.item() == pytest.approx(1.054, abs=0.004)


def test_a_student_that_sees_images_teaches_itself(build: Build, vlms: Any) -> None:
    keys: dict[str, Any] = {"assistant_only_loss": True, "max_length": 128, "max_steps": 2}
    student = str(vlms["student"])
    ours, theirs = (
        steps(build(LLaVAKDTrainer, vision_rows([1, 2, 0, 3] * 2), trainer={"model": student, "teacher": who}, **keys))
        for who in ("self", student)
    )
    assert ours == theirs


def test_ranks_hold_shares_of_what_is_kept(build: Build, completions: Dataset, ranks: Any) -> None:
    """The average of a student that FSDP2 cuts is cut too, saved whole, and the same after a resume."""
    keys = {"ce_weight": 0.5, "ema_decay": 0.5, "max_length": 128}
    for name, form in (("kd self fsdp2", "ema"), ("kd self ddp", "base")):
        alone = build(KDTrainer, completions, trainer=itself(), self_teacher=form, **keys)
        alone.train()
        for rank in ranks[name]:
            assert rank["kl"] == pytest.approx(losses_of(alone, "kl"), rel=1e-3, abs=1e-6)
            assert [loss for loss, _ in rank["steps"]] == pytest.approx(losses_of(alone), rel=1e-4)
    for whole, resumed in zip(ranks["kd self fsdp2"], ranks["kd self fsdp2 resumed"], strict=True):
        assert resumed["kl"] == whole["kl"]
        assert resumed["evaluated"] == whole["evaluated"]
    saved = load_file(ranks["kd self fsdp2"][0]["folder"] / "checkpoint-4" / "self_teacher.safetensors")
    assert {name: tensor.shape for name, tensor in saved.items()} == {
        name: parameter.shape for name, parameter in alone.model.named_parameters()
    }


def test_another_student_is_not_the_base_of_a_checkpoint(build: Build, texts: Dataset, tiny: Any) -> None:
    keys = {"ce_weight": 0.5, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    first = build(KDTrainer, texts, trainer=itself(), **keys)
    first.train()
    checkpoint = f"{first.args.output_dir}/checkpoint-2"
    moved = build(KDTrainer, texts, trainer=itself(checkpoint), **{**keys, "max_steps": 4})
    with pytest.raises(UserError, match="not the one that the checkpoint was trained from"):
        moved.train(resume_from_checkpoint=checkpoint)
    averaged = build(KDTrainer, texts, trainer=itself(), self_teacher="ema", **{**keys, "max_steps": 4})
    with pytest.raises(UserError, match=r"no averaged weights \(self_teacher.safetensors\)"):
        averaged.train(resume_from_checkpoint=checkpoint)
