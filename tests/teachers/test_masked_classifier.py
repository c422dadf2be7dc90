"""MST-Distill's masks: golden numbers of MaskNet, a mask that learns, and teachers of a recipe."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from mmkd.data.class_rows import ClassRows
from mmkd.errors import UserError
from mmkd.losses.gated_teachers import teacher_losses
from mmkd.models.mask_net import MaskNet, mask_net_for
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.run import build_trainer
from mmkd.teachers.classifiers import ClassifierTeacher
from mmkd.teachers.masked_classifier import MaskedTeacher
from tests.classes import pictures
from tests.trainers.test_dho_recipes import class_recipe

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "SECONDARY_losses.npz")
NAMES = ("red", "green", "blue")


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


def test_a_mask_is_that_of_the_authors() -> None:
    net = MaskNet(12).double()
    prefix = "mst_masknet_w__"
    weights = {name.removeprefix(prefix): golden(name) for name in GOLDEN.files if name.startswith(prefix)}
    net.load_state_dict(weights)
    given = golden("mst_masknet_x").double()
    torch.testing.assert_close(net.mask(given), golden("mst_masknet_mask").double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(net(given), given * golden("mst_masknet_mask").double(), rtol=1e-5, atol=1e-5)


def test_maps_and_tokens_have_one_mask_per_channel_and_large_layers_a_small_net() -> None:
    for shape in ((2, 8, 4, 4), (2, 5, 8)):
        features = torch.rand(shape)
        net = mask_net_for(features)
        assert net is not None
        ratio = net(features) / features
        channels = ratio.flatten(2) if len(shape) == 4 else ratio.transpose(1, 2)
        torch.testing.assert_close(channels, channels[..., :1].expand_as(channels))
        assert ((ratio > 0) & (ratio < 1)).all()
    assert mask_net_for(torch.rand(2)) is None
    assert MaskNet(768).mha.embed_dim == 48


def make_classifier(folder: Path, seed: int, width: int = 16) -> Path:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4, "num_labels": 3}
    config = ViTConfig(**sizes, initializer_range=0.3)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def classifier(folder: Path) -> ClassifierTeacher:
    model = AutoModelForImageClassification.from_pretrained(folder)
    return ClassifierTeacher(model, ViTImageProcessorPil.from_pretrained(folder), NAMES)


def test_a_mask_brings_a_teacher_near_to_the_student_and_leaves_both_as_they_are(tmp_path: Path) -> None:
    folders = make_classifier(tmp_path / "teacher", 0), make_classifier(tmp_path / "student", 1)
    plain, student = map(classifier, folders)
    rows = ClassRows(pictures(4), None)
    images = [rows.raw(number) for number in range(12)]
    wanted, before = student.logits(images), plain.logits(images)
    masked = MaskedTeacher(classifier(folders[0]), student, "vit.layers.0", str(folders[1]))
    masked.learn_from(rows.raw, 12, 4, epochs=30, rate=1e-2, seed=0)
    after = masked.logits(images)
    distances = [teacher_losses(said, wanted[:, None]).mean().item() for said in (before, after)]
    assert distances[1] < 0.8 * distances[0]
    torch.testing.assert_close(plain.logits(images), before)
    torch.testing.assert_close(student.logits(images), wanted)
    for name, own in masked.model.state_dict().items():
        assert torch.equal(own, plain.model.state_dict()[name])
    # Each has its own mask.
    again = MaskedTeacher(classifier(folders[0]), student, "vit.layers.0", str(folders[1]))
    again.learn_from(rows.raw, 12, 4, epochs=30, rate=1e-2, seed=0)
    torch.testing.assert_close(again.logits(images), after)
    with pytest.raises(UserError, match="has no such module"):
        MaskedTeacher(plain, student, "nowhere", "x")


def test_masked_teachers_of_a_recipe_go_through_the_gate(tmp_path: Path) -> None:
    teacher, student = (str(make_classifier(tmp_path / name, seed)) for seed, name in enumerate(("one", "two")))
    own = {"teacher": teacher, "teacher_kind": "masked", "mask_student": student}
    named = {"first": {**own, "mask_layer": "vit.layers.0"}, "last": {**own, "mask_layer": "vit.layers.1"}}
    recipe = str(class_recipe(tmp_path, output_dir=str(tmp_path / "run")))
    words = ["--teachers", json.dumps(named), "--mixing", "learned", "--teacher_cache", "null", "--teacher", "null"]
    trainer: Any = build_trainer(recipe_of(recipe, words).parse())
    logits = trainer.signals.logits
    assert logits.shape[1:] == (2, 3)
    assert not torch.allclose(logits[:, 0], logits[:, 1])
    identity = json.loads((tmp_path / "run" / "teacher_logits" / "last" / "class_logits.json").read_text())["identity"]
    assert "vit.layers.1" in json.dumps(identity)
    del own["mask_student"]
    with pytest.raises(UserError, match="needs mask_layer"):
        build_trainer(recipe_of(recipe, ["--teachers", json.dumps({"a": {**own}, "b": own}), *words[2:]]).parse())
