"""What is counted without data is what passes over data do."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from mmkd.preflight.count import ImageCounts, count_passes
from tests.families import FAMILIES, made

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
ROWS, TOKENS = 2, 24
NONE = ImageCounts(0.0, 0.0)
LINEAR = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
ATTENTION = 3 * 4 * ROWS * 4 * TOKENS * TOKENS * 16


def llama(empty: bool, **changed: Any) -> Any:
    config = LlamaConfig(**{**SIZES, **changed})
    if not empty:
        return LlamaForCausalLM(config)
    with init_empty_weights(include_buffers=False):
        return LlamaForCausalLM(config)


def saved_by(model: Any, bf16: bool) -> int:
    """Bytes that a real forward pass of the decoder keeps, parameters left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    embedded = torch.randn(ROWS, TOKENS, 64, requires_grad=True)
    # With padding, which needs a mask in memory; without it, a little less is kept.
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask[0, :3] = 0
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model.get_decoder()(inputs_embeds=embedded, attention_mask=mask, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_flops_are_those_of_the_formula() -> None:
    """2 per weight and token forward and twice that backward, and attention over the square of the length."""
    passes = count_passes(llama(empty=True), ROWS, TOKENS, NONE, bf16=False, train=True)
    assert passes.forward == 2 * ROWS * TOKENS * LINEAR + ATTENTION
    assert passes.backward == 2 * 2 * ROWS * TOKENS * LINEAR + 2.5 * ATTENTION
    assert passes.layers == 3
    assert passes.layer_inputs == 3 * ROWS * TOKENS * 64 * 4


@pytest.mark.parametrize("bf16", [False, True])
def test_saved_bytes_are_those_of_a_real_pass(bf16: bool) -> None:
    passes = count_passes(llama(empty=True), ROWS, TOKENS, NONE, bf16, train=True)
    assert passes.saved == pytest.approx(saved_by(llama(empty=False), bf16), rel=0.01)


def test_layers_that_differ_are_all_counted() -> None:
    model = llama(empty=True)
    with init_empty_weights(include_buffers=False):
        model.model.layers[1].mlp = LlamaMLP(LlamaConfig(**{**SIZES, "intermediate_size": 960}))
    passes = count_passes(model, ROWS, TOKENS, NONE, bf16=False, train=True)
    assert passes.forward == 2 * ROWS * TOKENS * (LINEAR + 3 * 64 * (960 - 96)) + ATTENTION


def test_memory_alone_is_counted_without_flops() -> None:
    whole = count_passes(llama(empty=True), ROWS, TOKENS, NONE, bf16=False, train=True)
    memory = count_passes(llama(empty=True), ROWS, TOKENS, NONE, bf16=False, train=True, flops=False)
    assert memory == replace(whole, forward=0.0, backward=0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_towers_of_all_families_are_counted(family: str) -> None:
    with init_empty_weights(include_buffers=False):
        model = made(family)[0]()
    text = count_passes(copy.deepcopy(model), ROWS, TOKENS, NONE, bf16=False, train=True, flops=False)
    both = count_passes(model, ROWS, TOKENS, ImageCounts(2.0, 8.0), bf16=False, train=True, flops=False)
    assert (both.forward > 0, both.saved > text.saved) == (True, True)


def test_a_teacher_has_no_backward_pass() -> None:
    passes = count_passes(llama(empty=True), ROWS, TOKENS, NONE, bf16=False, train=False)
    assert (passes.backward, passes.saved, passes.layer_inputs) == (0, 0, 0)
    assert passes.forward == 2 * ROWS * TOKENS * LINEAR + ATTENTION


def test_frozen_weights_need_no_gradient_of_their_own() -> None:
    """With LoRA the backward pass forms the gradients of inputs and of small matrices."""
    base = llama(empty=True)
    with torch.device("meta"):
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]), low_cpu_mem_usage=True)
    passes = count_passes(model, ROWS, TOKENS, NONE, bf16=False, train=True)
    assert 2 * ROWS * TOKENS * LINEAR < passes.backward < 1.2 * (2 * ROWS * TOKENS * LINEAR + 2.5 * ATTENTION)


def test_sizes_that_no_machine_here_holds() -> None:
    config = Qwen2Config(
        hidden_size=8192,
        intermediate_size=29568,
        num_hidden_layers=4,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=152064,
    )
    with init_empty_weights(include_buffers=False):
        model = Qwen2ForCausalLM(config)
    weights = sum(parameter.numel() for parameter in model.model.layers.parameters())
    passes = count_passes(model, 1, 2048, NONE, bf16=True, train=False)
    assert passes.forward == pytest.approx(2 * 2048 * weights, rel=0.1)
