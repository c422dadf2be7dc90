"""Dual encoders that learn through an adapter: what is left is an ordinary model, merged, and checkpoints go on."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from mmkd.commands.main import main
from mmkd.errors import UserError
from mmkd.models.dual_encoder import load_dual_encoder
from mmkd.models.whole_student import linear_layers
from tests.dual_encoders import caption, make_clip, make_pair_of_towers, make_sentence_encoder, make_siglip, photo
from tests.pairs import ADAPTER, EVERY_TERM, clip_kd, text_pairs
from tests.trainers.test_clip_kd import written

MAKERS: dict[str, Any] = {
    "clip": make_clip,
    "siglip": make_siglip,
    "towers": make_pair_of_towers,
    "sentences": make_sentence_encoder,
}


def adapted(folder: Path, family: str, **settings: Any) -> Any:
    """A trainer of an adapter of a student without dropout."""
    if family == "sentences":
        pytest.importorskip("sentence_transformers")
    student = load_dual_encoder(str(MAKERS[family](folder / "own")))
    for module in student.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    given: dict[str, Any] = {"model": student, "peft_config": LoraConfig(**ADAPTER)}
    if family == "sentences":
        teacher = load_dual_encoder(str(make_sentence_encoder(folder / "taught", seed=1, width=20)))
        given |= {"teachers": teacher, "train_dataset": text_pairs(24)}
    # An adapter starts with random weights.
    torch.manual_seed(0)
    usual = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "optim": "adamw_torch", **EVERY_TERM}
    return clip_kd(folder, given, **{**usual, **settings})


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def features(encoder: Any) -> list[Tensor]:
    """Of a text, and of a picture where the encoder sees some."""
    encoder.model.eval()
    with torch.no_grad():
        said = [encoder.encode_texts(encoder.prepare_texts([caption(0)]))]
        return [*said, *([encoder.encode_images(encoder.prepare_images([photo(0)]))] if encoder.has_images else [])]


@pytest.mark.parametrize("family", MAKERS)
def test_an_adapter_is_merged_into_what_is_left_and_goes_on(family: str, tmp_path: Path) -> None:
    trainer = adapted(tmp_path / "whole", family)
    before = {name: own.clone() for name, own in trainer.model.named_parameters() if not own.requires_grad}
    start = features(trainer.student)
    trainer.train()
    trainer.save_model()
    for name, own in trainer.model.named_parameters():
        assert name not in before or torch.equal(own, before[name]), name
    expected = features(trainer.student)
    assert not torch.allclose(expected[0], start[0], atol=1e-3)
    for folder in ("out", "out/checkpoint-2"):
        left = load_dual_encoder(str(tmp_path / "whole" / folder))
        assert not any("lora" in name for name, _ in left.model.named_parameters())
        assert left.logit_scale.item() == pytest.approx(trainer.student.logit_scale.item())
        for ours, theirs in zip(features(left), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    shutil.copytree(tmp_path / "whole" / "out" / "checkpoint-1", tmp_path / "cut" / "out" / "checkpoint-1")
    resumed = adapted(tmp_path / "cut", family)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == pytest.approx(losses(trainer), rel=1e-5)
    for ours, theirs in zip(features(resumed.student), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_layers_whose_output_an_adapter_cannot_change_have_none(tmp_path: Path) -> None:
    """SigLIP pools by torch's own attention, which multiplies by the weights of its layer itself."""
    model = load_dual_encoder(str(make_siglip(tmp_path / "own"))).model
    names = linear_layers(model)
    assert any(name.endswith("self_attn.out_proj") for name in names)
    assert "vision_model.head.attention.out_proj" not in names


def test_a_frozen_tower_keeps_its_adapter_at_nothing(tmp_path: Path) -> None:
    trainer = adapted(tmp_path, "clip", freeze="image", icl_weight=0.0, feature_mse_weight=0.0, max_steps=1)
    trained = [name for name, own in trainer.model.named_parameters() if own.requires_grad]
    assert trained
    assert not any(name.startswith(("vision_model", "visual")) for name in trained)


def test_an_adapter_of_other_modules_and_a_checkpoint_without_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot have this adapter.*nothing_here"):
        clip_kd(tmp_path, {"peft_config": LoraConfig(r=2, target_modules=["nothing_here"])})
    clip_kd(tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    trainer = adapted(tmp_path, "clip", max_steps=2)
    with pytest.raises(UserError, match="is no checkpoint of a training with an adapter"):
        trainer.train(resume_from_checkpoint=True)


def test_a_recipe_with_an_adapter_is_checked_planned_and_trained(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = str(written(tmp_path, use_peft=True, lora_r=4, save_open_clip=True))
    assert main(["doctor", recipe]) == 0
    assert main(["plan", recipe, "--gpu", "L4"]) == 0
    assert main(["train", recipe]) == 0
    left = load_dual_encoder(str(tmp_path / "out"))
    start = load_dual_encoder(str(tmp_path / "student"))
    assert left.model.state_dict().keys() == start.model.state_dict().keys()
    assert not torch.allclose(features(left)[0], features(start)[0])
    packed = load_dual_encoder(str(tmp_path / "out" / "open_clip"))
    torch.testing.assert_close(features(packed)[0], features(left)[0], rtol=1e-4, atol=1e-5)
    capfd.readouterr()
    assert main(["train", recipe, "--load_in_4bit", "true", "--output_dir", str(tmp_path / "other")]) == 2
    assert "does not quantise its student" in " ".join(capfd.readouterr().err.split())
