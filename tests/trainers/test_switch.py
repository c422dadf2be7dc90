"""llava_kd's switch: the student's visual output through the teacher, against the models taken apart."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from mmkd.losses.logit_differences import dbild
from mmkd.methods.llava_kd import LLaVAKDConfig, LLaVAKDTrainer
from mmkd.teachers.self_teacher import SelfTeacher
from tests.helpers import LORA, Build, losses_of
from tests.trainers.test_llava_kd import loss_and_gradients, one_batch, steps
from tests.vlms import make_llava, vision_rows

# Terms of llava_kd that would hide the switch are as small as they may be.
ALONE: dict[str, Any] = {"alpha": 0.0, "beta": 0.0, "gamma": 0.0}


@pytest.fixture
def build_vlm(build: Build, vlms: dict[str, Path]) -> Build:
    """The `build` fixture with the LLaVA models and a switch."""

    def built(cls: Any, data: Dataset, trainer: dict[str, Any] | None = None, **settings: Any) -> Any:
        models = {"model": str(vlms["student"]), "teacher": str(vlms["teacher"]), **(trainer or {})}
        keys = {"assistant_only_loss": True, "max_length": 128, "switch": {"weight": 0.7}, **settings}
        return build(cls, data, trainer=models, **keys)

    return built


def switched_tokens(student: Any, teacher: Any, batch: Any) -> torch.Tensor:
    """The term of each token: features of the student's tower, put into the teacher's embeddings by hand."""
    view = batch.student
    config = student.config
    tower = student.model.vision_tower(view["pixel_values"], output_hidden_states=True)
    features = teacher.model.multi_modal_projector(tower.hidden_states[config.vision_feature_layer][:, 1:])
    embeddings = teacher.get_input_embeddings()(view["input_ids"]).detach()
    places = (view["input_ids"] == config.image_token_id)[..., None]
    embeddings = embeddings.masked_scatter(places, features)
    switched = teacher(inputs_embeds=embeddings, attention_mask=view["attention_mask"]).logits
    own = teacher(**view.inputs).logits
    chosen = view.supervised.clone()
    chosen[[row for row in range(len(chosen)) if row not in view.images[:, 0].tolist()]] = False
    both = [(logits[:, :-1][chosen] / 3.0).log_softmax(-1) for logits in (switched, own.detach())]
    return 9 * dbild(*both)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradient_are_those_of_features_put_in_by_hand(build_vlm: Build, checkpointing: bool) -> None:
    rows = vision_rows([1, 2, 0, 1])
    trainer: Any = build_vlm(LLaVAKDTrainer, rows, activation_checkpointing=checkpointing, **ALONE)
    batch = one_batch(trainer)
    terms = switched_tokens(trainer.model, trainer.teacher.model, batch)
    assert len(terms) < int(batch.student.supervised.sum())
    (0.7 * terms.mean()).backward()
    wanted = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert wanted
    assert all("vision_tower" in name for name in wanted)
    without: Any = build_vlm(LLaVAKDTrainer, rows, **{**ALONE, "alpha": 1e-9, "switch": None})
    plain, gradients = loss_and_gradients(without, one_batch(without))
    loss, found = loss_and_gradients(trainer, batch)
    assert loss == pytest.approx(plain + 0.7 * terms.mean().item(), rel=1e-4)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradients[name] + gradient, rtol=1e-3, atol=1e-5, msg=name)
    assert all(p.grad is None for p in trainer.teacher.model.parameters())
    # The hooks are gone: the teacher sees its own tower's output again.
    assert not any(module._forward_pre_hooks for module in trainer.teacher.model.modules())


def test_losses_do_not_depend_on_how_a_batch_is_cut(build_vlm: Build) -> None:
    data = vision_rows([1, 2, 0, 3] * 2)
    whole = steps(build_vlm(LLaVAKDTrainer, data))
    single = build_vlm(LLaVAKDTrainer, data, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert steps(single) == [pytest.approx(pair, rel=1e-4) for pair in whole]
    assert losses_of(single, "switch")[-1] > 0


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_losses_do_not_depend_on_ranks(build_vlm: Build, ranks: Any, how: str) -> None:
    """The gradient goes through a teacher whose weights are sharded, and layers that are computed again."""
    expected = steps(build_vlm(LLaVAKDTrainer, vision_rows([1, 2, 0, 3] * 6), switch={"weight": 2.0}))
    for rank in ranks[f"llava_kd switch {how}"]:
        assert rank["steps"] == [pytest.approx(pair, rel=1e-3) for pair in expected]


def test_adapters_in_the_tower_learn_from_it(build_vlm: Build) -> None:
    adapter = LoraConfig(**{**LORA, "target_modules": ["q_proj", "v_proj"]})
    trainer: Any = build_vlm(LLaVAKDTrainer, vision_rows([1, 2, 0, 1]), trainer={"peft_config": adapter}, **ALONE)
    found = loss_and_gradients(trainer, one_batch(trainer))[1]
    assert any("vision_tower" in name and "lora_A" in name for name in found)
    text = LoraConfig(**{**LORA, "target_modules": r".*language_model.*q_proj"})
    with pytest.raises(ValueError, match=r"its layers to lora_target_modules"):
        build_vlm(LLaVAKDTrainer, vision_rows([1]), trainer={"peft_config": text})


def test_the_tower_learns_and_an_evaluation_says_so(build_vlm: Build, vlms: dict[str, Path], tmp_path: Path) -> None:
    """Only a student with another tower has something to learn."""
    same: Any = build_vlm(LLaVAKDTrainer, vision_rows([1, 2]), max_steps=1)
    same.train()
    assert losses_of(same, "switch")[0] == pytest.approx(0, abs=1e-4)
    other = make_llava(tmp_path / "other")
    trainer: Any = build_vlm(
        LLaVAKDTrainer,
        vision_rows([1, 2] * 4),
        trainer={"model": str(other)},
        max_steps=20,
        trainable=["vision_tower"],
        switch={"weight": 5.0, "temperature": 1.0},
        **ALONE,
    )
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "vision_tower" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    trainer.train()
    values = losses_of(trainer, "switch")
    assert sum(values[-3:]) < sum(values[:3])
    evaluated = trainer.evaluate(eval_dataset=vision_rows([1, 0, 2]))
    assert evaluated["eval_switch"] > 0
    assert evaluated["eval_loss"] == pytest.approx(evaluated["eval_ce"] + 5 * evaluated["eval_switch"], rel=1e-4)


def test_what_cannot_be_switched_is_refused(build_vlm: Build, vlms: dict[str, Path], tmp_path: Path) -> None:
    data = vision_rows([0, 1])
    with pytest.raises(ValueError, match=r"teaches the vision tower, and nothing .* trained there"):
        build_vlm(LLaVAKDTrainer, data, trainable=["connector", "language_model"])
    wide = make_llava(tmp_path / "wide", hidden_size=48)
    with pytest.raises(ValueError, match=r"The towers have different widths \(48 and 16\)"):
        build_vlm(LLaVAKDTrainer, data, trainer={"model": str(wide)})
    with pytest.raises(ValueError, match="different numbers of patches"):
        build_vlm(LLaVAKDTrainer, data, trainer={"model": str(vlms["fine"])}, visual_tokens="pool")
    with pytest.raises(ValueError, match="would run the student inside its own forward pass"):
        build_vlm(LLaVAKDTrainer, data, trainer={"teacher": SelfTeacher()})


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"switch": {"weight": 0}}, "switch.weight is 0; give a number above 0"),
        ({"switch": {"wieght": 1.0}}, "did you mean 'weight'"),
        ({"switch": {"divergence": "jsd"}}, "choose one of bild, dbild, forward_kl, reverse_kl"),
        ({"switch": "yes"}, "which is no JSON"),
        ({"switch": "[1]"}, "write a mapping"),
        ({"switch": {}, "combine": "gradmag"}, "reaches the vision tower only"),
        ({"switch": {}, "torch_compile": True}, "leaves out the hooks"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLaVAKDConfig(str(tmp_path), **wrong)


def test_a_switch_alone_is_a_teacher(tmp_path: Path) -> None:
    config = LLaVAKDConfig(str(tmp_path), **ALONE, switch='{"temperature": 2}')
    assert config.switching is not None
    assert (config.switching.weight, config.switching.divergence, config.switching.temperature) == (1.0, "dbild", 2)
