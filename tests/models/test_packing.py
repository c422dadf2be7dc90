"""The probe that finds models in which sequences that are laid end to end see each other."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GptOssConfig,
    JambaConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from mmkd.models.backbone import allow_consumers
from mmkd.models.packing import check_packing
from tests.families import made, model_of

_PLAIN: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.2}
_SIZES: dict[str, Any] = {**_PLAIN, "num_attention_heads": 2, "intermediate_size": 48, "num_key_value_heads": 2}
_JAMBA: dict[str, Any] = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 8,
}
APART: dict[str, PreTrainedConfig] = {
    "Llama": LlamaConfig(**_SIZES),
    "GPT-2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2),
    "Mixtral": MixtralConfig(**_SIZES, num_local_experts=2),
}
TOGETHER: dict[str, PreTrainedConfig] = {
    "OPT": OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        word_embed_proj_dim=32,
        init_std=0.2,
    ),
    "Falcon": FalconConfig(**_PLAIN, num_attention_heads=2),
    "BLOOM": BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.2),
    "Mamba": MambaConfig(**_PLAIN, state_size=8),
    "Jamba": JambaConfig(**_SIZES, num_experts=2, **_JAMBA),
    "GPT-OSS": GptOssConfig(**_SIZES, num_local_experts=2, num_experts_per_tok=1, head_dim=16),
}


def model_from(config: PreTrainedConfig, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, **kwargs).to(dtype)
    allow_consumers(model)
    return model


def probe(model: Any) -> None:
    check_packing(model, "student", DataCollatorForLanguageModeling(0, padding_free=True), {0})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", APART)
def test_models_that_heed_positions_pass(family: str, dtype: torch.dtype) -> None:
    for attention in ("eager", "sdpa"):
        probe(model_from(APART[family], dtype, attn_implementation=attention))


@pytest.mark.parametrize("family", TOGETHER)
def test_models_in_which_sequences_see_each_other_are_refused(family: str) -> None:
    model = model_from(TOGETHER[family])
    with pytest.raises(ValueError, match=r"The student \(\w+, attention \w+\) lets.*packing: false"):
        probe(model)


def test_the_probe_leaves_mode_gradients_and_random_numbers_alone() -> None:
    model = model_from(LlamaConfig(**_SIZES, attention_dropout=0.5)).train()
    model.get_input_embeddings().weight.requires_grad_(False)
    state = torch.get_rng_state()
    probe(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", ["Llama", "OPT"])
def test_a_model_with_an_adapter_is_probed_through_it(family: str) -> None:
    config = {**APART, **TOGETHER}[family]
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_config(config), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    allow_consumers(model)
    if family == "Llama":
        probe(model)
    else:
        with pytest.raises(ValueError, match="OPTForCausalLM"):
            probe(model)


def test_a_vision_language_model_is_probed_with_text() -> None:
    make, processor = made("Idefics3")
    model = model_of(make, 0)
    allow_consumers(model)
    special = set(processor.tokenizer.all_special_ids) | set(processor.tokenizer.get_added_vocab().values())
    check_packing(model, "student", DataCollatorForLanguageModeling(0, padding_free=True), special)


def test_a_model_that_waits_for_a_gpu_with_flash_attention_is_not_asked() -> None:
    model = model_from(copy.deepcopy(TOGETHER["OPT"]))
    model.config._attn_implementation = "flash_attention_2"
    probe(model)
