"""Tiny students that are mixtures of experts."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from scripts.make_tiny_models import make_tokenizer, save

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.5,
}
FAMILIES: dict[str, Any] = {
    "mixtral": lambda rows: MixtralConfig(vocab_size=rows, num_local_experts=4, **SHAPE),
    "qwen2_moe": lambda rows: Qwen2MoeConfig(vocab_size=rows, num_experts=4, moe_intermediate_size=16, **SHAPE),
    "qwen3_moe": lambda rows: Qwen3MoeConfig(vocab_size=rows, num_experts=4, moe_intermediate_size=16, **SHAPE),
    "olmoe": lambda rows: OlmoeConfig(vocab_size=rows, num_experts=4, **SHAPE),
    "granitemoe": lambda rows: GraniteMoeConfig(vocab_size=rows, num_local_experts=4, **SHAPE),
    "gpt_oss": lambda rows: GptOssConfig(vocab_size=rows, num_local_experts=4, **SHAPE),
}


def experts(folder: Path, family: str = "mixtral") -> str:
    """A student whose experts are not used alike."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(FAMILIES[family](len(tokenizer)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gate.weight", "router.weight", "router.layer.weight")):
                parameter.normal_(0, 1)
    return str(save(model, tokenizer, folder / family))
