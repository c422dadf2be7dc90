"""LLaVA students of parts, and the parts of a model that are trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Idefics3Config,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from mmkd.models.llava import assemble_llava, llava_processor
from mmkd.models.load import load_model
from mmkd.models.parts import part_of, train_only
from scripts.make_tiny_models import make_model, make_tokenizer, save
from tests.helpers import VISION
from tests.vlms import make_llava, make_tower, picture

TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
CROP: Any = {"height": 8, "width": 8}


def clip(folder: Path) -> None:
    CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=CROP).save_pretrained(folder)


def siglip(folder: Path) -> None:
    SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION)).save_pretrained(folder)
    SiglipImageProcessorPil(size=CROP).save_pretrained(folder)


def dinov2(folder: Path) -> None:
    shape = {key: value for key, value in VISION.items() if key != "intermediate_size"}
    Dinov2Model(Dinov2Config(**shape)).save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 8}, crop_size=CROP).save_pretrained(folder)


@pytest.fixture
def language_model(tmp_path: Path) -> Path:
    tokenizer = make_tokenizer()
    return save(make_model(rows=len(tokenizer)), tokenizer, tmp_path / "llm")


@pytest.mark.parametrize("make", [make_tower, clip, siglip, dinov2])
def test_students_of_different_towers_load_in_plain_transformers(
    make: Any, language_model: Path, tmp_path: Path
) -> None:
    make(tmp_path / "tower")
    model = assemble_llava(tmp_path / "tower", language_model)
    model.save_pretrained(tmp_path / "student")
    llava_processor(tmp_path / "tower", language_model).save_pretrained(tmp_path / "student")
    whole: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "student", output_loading_info=True)
    loaded, info = whole
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "student")
    assert isinstance(loaded, LlavaForConditionalGeneration)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    content = [{"type": "image", "image": picture(0)}, {"type": "text", "text": "the cat"}]
    said = {"role": "assistant", "content": [{"type": "text", "text": "saw birds"}]}
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": content}, said]],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
    )
    answer = inputs["input_ids"][0][inputs.pop("assistant_masks")[0] == 1]
    assert processor.decode(answer) == " saw birds<|end|>"
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 4
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


def tower_names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name for name in file.keys() if "vision_tower" in name}  # noqa: SIM118


@pytest.mark.parametrize("make", [make_tower, clip, siglip])
def test_towers_are_saved_under_the_names_that_vllm_reads(make: Any, language_model: Path, tmp_path: Path) -> None:
    """Of an assembled student, and of one that was loaded; the names of transformers 5 itself load as well."""
    make(tmp_path / "tower")
    model: Any = assemble_llava(tmp_path / "tower", language_model)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "first")
    again = load_model(str(tmp_path / "first"))
    again.save_pretrained(tmp_path / "second")
    for folder in ("first", "second"):
        names = tower_names(tmp_path / folder)
        assert names
        assert all(name.startswith("vision_tower.vision_model.") for name in names)
    model._weight_conversions = None
    model.save_pretrained(tmp_path / "flat")
    assert not any("vision_model" in name for name in tower_names(tmp_path / "flat"))
    for folder in ("first", "second", "flat"):
        torch.testing.assert_close(load_model(str(tmp_path / folder)).state_dict(), expected, rtol=0, atol=0)


def test_parts_are_the_pretrained_ones(language_model: Path, tmp_path: Path) -> None:
    model = assemble_llava(make_tower(tmp_path / "tower"), language_model)
    text, ours = load_model(str(language_model)), model.state_dict()
    for name, tensor in text.state_dict().items():
        if name.startswith("model.layers"):
            assert torch.equal(ours[name.replace("model.", "model.language_model.", 1)], tensor)
    # A row for <image>, and the embeddings stay tied as they were.
    assert ours["lm_head.weight"].shape[0] == text.state_dict()["lm_head.weight"].shape[0] + 1
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_towers_with_an_unknown_layout_are_refused(language_model: Path, tmp_path: Path) -> None:
    shape = {key: value for key, value in VISION.items() if key != "intermediate_size"}
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**shape)).save_pretrained(tmp_path / "tower")
    with pytest.raises(ValueError, match="with register tokens"):
        assemble_llava(tmp_path / "tower", language_model)


def test_a_student_of_a_student_is_refused(tmp_path: Path) -> None:
    whole = make_llava(tmp_path / "whole")
    with pytest.raises(ValueError, match="vision-language model already"):
        assemble_llava(whole / "tower", whole)


def test_parts_of_other_families() -> None:
    qwen = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16}
    text: Any = {**TEXT, "num_key_value_heads": 2}
    configs = [
        (Qwen2VLConfig(text_config=text, vision_config=qwen), "merger"),
        (Idefics3Config(text_config={**text, "model_type": "llama"}, vision_config=VISION), "connector"),
    ]
    for config, connector in configs:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        parts = {name: part_of(name) for name, _ in model.named_parameters()}
        assert set(parts.values()) == {"vision_tower", "connector", "language_model"}
        assert all((connector in name) == (part == "connector") for name, part in parts.items())


def test_a_part_that_is_missing_is_named(language_model: Path) -> None:
    with pytest.raises(ValueError, match="has no such part: it has language_model"):
        train_only(load_model(str(language_model)), ["connector"])
