"""Vision towers alone: taken out of larger models, cut, and read as maps of patches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from mmkd.errors import UserError
from mmkd.models.vision_towers import cut_tower, grid_of, load_tower, look, tower_config
from scripts.make_tiny_models import make_model, make_tokenizer, save
from tests.classes import make_clip
from tests.helpers import VISION
from tests.towers import clip_tower, dino_tower
from tests.vlms import make_llava

SIZES: dict[str, Any] = {**VISION, "initializer_range": 0.3}
TOWERS: dict[str, Any] = {
    "clip": clip_tower,
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**VISION)),
    "dinov2": lambda: dino_tower(side=8),
    "dinov2 with registers": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        )
    ),
    "vit": lambda: ViTModel(ViTConfig(**VISION), add_pooling_layer=False),
}


@pytest.mark.parametrize("name", list(TOWERS))
def test_patches_are_a_map_and_the_summary_is_that_of_the_image(name: str, tmp_path: Path) -> None:
    TOWERS[name]().save_pretrained(tmp_path)
    tower = load_tower(str(tmp_path), "student").eval()
    pixels = torch.rand(2, 3, 8, 8)
    view, outputs = look(tower, pixels), tower(pixel_values=pixels, output_hidden_states=True)
    tokens = view.patches.flatten(1, 2)
    assert tokens.shape[1] == 4
    assert torch.equal(tokens, outputs.last_hidden_state[:, -4:])
    assert view.summary.shape[0] == 2
    # The hidden layer that a LLaVA-style student reads.
    assert torch.equal(look(tower, pixels, -2).patches.flatten(1, 2), outputs.hidden_states[-2][:, -4:])
    cut = cut_tower(tower, [1]).eval()
    assert cut.config.num_hidden_layers == 1
    own = {key.replace(".0.", ".1."): tensor for key, tensor in cut.state_dict().items()}
    assert all(torch.equal(tensor, tower.state_dict()[key]) for key, tensor in own.items())
    assert look(cut, pixels).patches.shape == view.patches.shape


def test_a_convolution_has_a_map_and_the_mean_of_it(tmp_path: Path) -> None:
    ConvNextModel(ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2)).save_pretrained(tmp_path)
    tower = load_tower(str(tmp_path), "student").eval()
    view = look(tower, torch.rand(2, 3, 32, 32))
    assert view.patches.shape == (2, 4, 4, 8)
    assert torch.allclose(view.summary, view.patches.mean((1, 2)))
    with pytest.raises(UserError, match="does not keep its layers in one list"):
        cut_tower(tower, 1)


@pytest.mark.parametrize("kind", ["clip", "llava"])
def test_a_tower_is_taken_out_of_a_larger_model(kind: str, tmp_path: Path) -> None:
    folder = make_clip(tmp_path / "whole") if kind == "clip" else make_llava(tmp_path / "whole")
    tower = load_tower(str(folder), "teacher")
    assert isinstance(tower, CLIPVisionModel)
    whole: Any = (AutoModel if kind == "clip" else LlavaForConditionalGeneration).from_pretrained(folder)
    inside = whole.vision_model if kind == "clip" else whole.model.vision_tower
    assert all(torch.equal(tensor, inside.state_dict()[name]) for name, tensor in tower.state_dict().items())


def test_what_is_no_tower(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    folder = save(make_model(rows=len(tokenizer)), tokenizer, tmp_path / "llm")
    with pytest.raises(UserError, match="sees no images"):
        tower_config(str(folder), "teacher")
    with pytest.raises(UserError, match="cannot be loaded"):
        tower_config(str(tmp_path / "nothing"), "teacher")
    (tmp_path / "qwen").mkdir()
    (tmp_path / "qwen" / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    with pytest.raises(UserError, match="reads an image as a list of patches"):
        tower_config(str(tmp_path / "qwen"), "teacher")


@pytest.mark.parametrize(
    ("tokens", "size", "patch", "grid"),
    [
        (5, (8, 8), 4, (2, 2, 1)),
        (6, (8, 12), 4, (2, 3, 0)),
        (9, (8, 8), None, (3, 3, 0)),
        (10, (8, 8), None, (3, 3, 1)),
    ],
)
def test_grids(tokens: int, size: tuple[int, int], patch: int | None, grid: tuple[int, int, int]) -> None:
    assert grid_of(tokens, size, patch) == grid


def test_tokens_that_are_no_grid() -> None:
    with pytest.raises(UserError, match="7 tokens of an image of 8 x 8"):
        grid_of(7, (8, 8), None)
