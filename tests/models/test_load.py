"""load_model and load_processing_class: what loads, and what is told when nothing does."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from mmkd.models.load import load_model, load_processing_class, tokenizer_of
from tests.helpers import VISION

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
loaders = pytest.mark.parametrize("loader", [load_model, load_processing_class])


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """No test can reach the Hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def saved(tmp_path) -> Path:
    """The folder of a tiny saved language model without tokenizer."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def save_tokenizer(folder: Path) -> None:
    backend = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)


def refused(folder: Path | str, why: str, role: str = "teacher") -> Any:
    """Expects a ValueError that names role and model before it says why."""
    return pytest.raises(ValueError, match=rf"(?s)^The {role} {re.escape(repr(str(folder)))} .*{why}")


# What loads


def test_saved_model_loads_with_its_weights(saved):
    model = load_model(str(saved), "student")
    assert isinstance(model, LlamaForCausalLM)
    expected = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_type_is_a_name_or_a_torch_type(saved, dtype):
    assert load_model(str(saved), dtype=dtype).dtype == torch.bfloat16


def test_automatic_type_is_that_of_the_file(saved):
    load_model(str(saved), dtype="float16").save_pretrained(saved)
    assert load_model(str(saved), dtype="auto").dtype == torch.float16


def test_settings_left_empty_are_left_out(saved):
    model = load_model(str(saved), dtype=None, quantization_config=None, revision=None, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_configuration_with_vision_chooses_the_image_text_class(tmp_path):
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**SHAPE), image_token_index=60
    )
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "vlm")
    assert isinstance(load_model(str(tmp_path / "vlm")), LlavaForConditionalGeneration)


def test_sharded_weights_load(saved):
    model = load_model(str(saved))
    (saved / "model.safetensors").unlink()
    model.save_pretrained(saved, max_shard_size="4KB")
    assert len(list(saved.glob("*.safetensors"))) > 1
    torch.testing.assert_close(load_model(str(saved)).state_dict(), model.state_dict(), rtol=0, atol=0)


def test_tokenizer_loads_and_is_its_own_tokenizer(saved):
    save_tokenizer(saved)
    tokenizer = load_processing_class(str(saved), "student", revision=None)
    assert tokenizer_of(tokenizer) is tokenizer
    assert tokenizer_of(tokenizer).get_vocab() == {"<unk>": 0, "a": 1, "b": 2}


# What does not


@loaders
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_missing_folder_is_refused(tmp_path, loader, role):
    folder = tmp_path / "absent"
    with refused(folder, "there is no such folder", role):
        loader(str(folder), role)


@loaders
@pytest.mark.parametrize("name", ["./absent", "~/absent", "a/b/c"])
def test_name_that_can_only_be_a_folder_is_called_one(loader, name):
    with refused(name, "there is no such folder"):
        loader(name, "teacher")


@loaders
def test_unknown_hub_id_is_refused_with_what_to_check(loader):
    with refused("nobody/nothing", "neither a local folder nor reachable as a Hub id .check the spelling"):
        loader("nobody/nothing", "teacher")


@loaders
def test_folder_without_configuration_is_refused_with_its_contents(tmp_path, loader):
    (tmp_path / "notes.txt").write_text("nothing to load")
    with refused(tmp_path, r"the folder holds notes\.txt;"):
        loader(str(tmp_path), "teacher")


@loaders
def test_adapter_is_refused_with_what_to_do(tmp_path, loader):
    (tmp_path / "adapter_config.json").write_text("{}")
    with refused(tmp_path, "holds an adapter: merge it"):
        loader(str(tmp_path), "teacher")


@loaders
def test_empty_folder_is_refused(tmp_path, loader):
    with refused(tmp_path, "the folder holds nothing;"):
        loader(str(tmp_path), "teacher")


@loaders
@pytest.mark.parametrize("text", ['{"model_type": ', "[]", '{"model_type": "no such type"}'])
def test_unreadable_configuration_is_refused(saved, loader, text):
    (saved / "config.json").write_text(text)
    with refused(saved, r"config\.json"):
        loader(str(saved), "teacher")


def damage(kind: str, weights: bytes) -> bytes:
    return {"empty": b"", "cut off": weights[:-10], "header only": weights[:100], "something else": b"<html>"}[kind]


@pytest.mark.parametrize("kind", ["empty", "cut off", "header only", "something else"])
def test_damaged_weights_are_refused(saved, kind):
    file = saved / "model.safetensors"
    file.write_bytes(damage(kind, file.read_bytes()))
    with refused(saved, r"the folder holds .*model\.safetensors;"):
        load_model(str(saved), "teacher")


def test_pickled_weights_are_refused(saved):
    torch.save(load_model(str(saved)).state_dict(), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    with refused(saved, r"pytorch_model\.bin; .*model\.safetensors"):
        load_model(str(saved), "teacher")


@pytest.mark.parametrize("dtype", ["bfloat17", "nn", ""])
def test_unknown_type_is_refused_with_the_known_ones(saved, dtype):
    with pytest.raises(ValueError, match=rf"teacher's dtype '{dtype}' is none of torch's; use auto, float32"):
        load_model(str(saved), "teacher", dtype=dtype)


def test_configuration_of_a_model_that_speaks_no_language_is_refused(tmp_path):
    CLIPVisionConfig(**VISION).save_pretrained(tmp_path)
    with refused(tmp_path, "AutoModelForCausalLM"):
        load_model(str(tmp_path), "teacher")


def test_missing_tokenizer_is_refused(saved):
    with refused(saved, r"has no loadable tokenizer: .*model\.safetensors;", "student"):
        load_processing_class(str(saved), "student")


def test_reason_is_the_libraries_own_first_line_and_their_error_is_kept(tmp_path):
    with refused(tmp_path, r"\([^\n]+\)$") as caught:
        load_model(str(tmp_path), "teacher")
    assert caught.value.__cause__ is not None


def test_model_that_came_from_nowhere_has_no_tokenizer():
    with refused("", "not loaded from anywhere"):
        load_processing_class("", "teacher")
