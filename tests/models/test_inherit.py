"""Inherited weights: the authors' numbers, and that nothing in a student is anything but a part of its teacher."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from mmkd.errors import UserError
from mmkd.models.inherit import Heads, TowerSize, inherit_config, inherit_model, inherited_weights, tower_sizes

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "SECONDARY_losses.npz")
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5, "num_attention_heads": 4}
VISION, TEXT = {**TOWER, "image_size": 8, "patch_size": 4}, {**TOWER, "vocab_size": 20, "max_position_embeddings": 6}


def golden(prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): torch.tensor(array) for name, array in GOLDEN.items() if name.startswith(prefix)
    }


def clip() -> CLIPModel:
    torch.manual_seed(0)
    config = CLIPConfig(vision_config=VISION, text_config={**TEXT, "eos_token_id": 19}, projection_dim=12)
    return CLIPModel(config).eval()


def test_weights_are_those_of_tinyclip() -> None:
    teacher, expected = golden("tcinh_tea__"), golden("tcinh_out__")
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    weights = inherited_weights(shapes, teacher, {"": Heads(2, 4)})
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=0)


def test_a_student_of_clip_has_fronts_of_every_other_layer_and_whole_heads() -> None:
    teacher = clip()
    sizes = {"vision": TowerSize(2, 8, 2, 12), "text": TowerSize(3, 12, 3, 20)}
    student = inherit_model(inherit_config(teacher.config, sizes), teacher)
    assert tower_sizes(student.config) == sizes
    ours, theirs = student.state_dict(), teacher.state_dict()
    key = "encoder.layers.{}.self_attn.k_proj.weight"
    taken = theirs[f"vision_model.{key.format(2)}"][:8, :8]
    torch.testing.assert_close(ours[f"vision_model.{key.format(1)}"], taken)
    torch.testing.assert_close(ours[f"text_model.{key.format(2)}"], theirs[f"text_model.{key.format(2)}"][:12, :12])
    torch.testing.assert_close(ours["visual_projection.weight"], theirs["visual_projection.weight"][:, :8])
    pixels, ids = torch.randn(2, 3, 8, 8), torch.tensor([[1, 2, 19], [3, 4, 19]])
    with torch.no_grad():
        assert student(input_ids=ids, pixel_values=pixels).logits_per_image.isfinite().all()
        whole = inherit_model(teacher.config, teacher)(input_ids=ids, pixel_values=pixels)
        torch.testing.assert_close(
            whole.logits_per_image, teacher(input_ids=ids, pixel_values=pixels).logits_per_image
        )


def test_a_student_of_siglip_projects_texts_to_its_own_width() -> None:
    torch.manual_seed(0)
    teacher = SiglipModel(SiglipConfig(vision_config=VISION, text_config={**TEXT, "projection_size": 16})).eval()
    sizes = {tower: TowerSize(2, 8, 2, 12) for tower in ("vision", "text")}
    student = inherit_model(inherit_config(teacher.config, sizes), teacher)
    queries = teacher.state_dict()["vision_model.head.attention.in_proj_weight"].unflatten(0, (3, 16))[:, :8, :8]
    torch.testing.assert_close(
        student.state_dict()["vision_model.head.attention.in_proj_weight"], queries.flatten(0, 1)
    )
    outputs = student(input_ids=torch.ones(2, 6, dtype=torch.long), pixel_values=torch.randn(2, 3, 8, 8))
    assert outputs.text_embeds.shape == outputs.image_embeds.shape == (2, 8)


def test_heads_with_fewer_channels_are_fronts_of_heads() -> None:
    teacher = {
        "self_attn.q_proj.weight": torch.arange(8.0)[:, None],
        "self_attn.out_proj.weight": torch.arange(8.0)[None],
    }
    shapes = {"self_attn.q_proj.weight": (2, 1), "self_attn.out_proj.weight": (1, 2)}
    weights = inherited_weights(shapes, teacher, {"": Heads(2, 4)})
    assert weights["self_attn.q_proj.weight"].flatten().tolist() == [0, 2]
    assert weights["self_attn.out_proj.weight"].flatten().tolist() == [0, 2]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75, 1.0])
def test_a_share_of_a_tower_is_about_that_share_of_its_weights(share: float) -> None:
    large = TowerSize(12, 768, 12, 3072)
    small = large.share(share)
    assert small.weights / large.weights == pytest.approx(share, rel=0.02)
    assert small.width == small.heads * 64
    if share == 1:
        assert small == large


def test_what_cannot_be_inherited_is_named() -> None:
    tower = TowerSize(4, 32, 4, 64)
    with pytest.raises(UserError, match="layers: 5 of the vision tower, of which the teacher has 4"):
        tower.with_sizes("vision", {"layers": 5})
    with pytest.raises(UserError, match="a multiple of 8: name 16"):
        tower.with_sizes("text", {"width": 18})
    assert tower.with_sizes("text", {"width": 16}) == TowerSize(4, 16, 2, 32)
    weights = {"layers.0.fc.weight": torch.zeros(4, 4)}
    with pytest.raises(UserError, match="2 layers in layers, and the teacher 1"):
        inherited_weights({"layers.1.fc.weight": (2, 2)}, weights)
    with pytest.raises(UserError, match=r"no layers.0.gc.weight"):
        inherited_weights({"layers.0.gc.weight": (2, 2)}, weights)
    with pytest.raises(UserError, match="as wide or wider"):
        inherited_weights({"layers.0.fc.weight": (8, 2)}, weights)
    with pytest.raises(UserError, match="within one architecture"):
        inherit_model(SiglipConfig(), clip())
