"""head_of and allow_consumers: hidden states and head of a model, which together give the model's own logits."""

import copy
import inspect
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Cohere2Config,
    Cohere2VisionConfig,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlavaConfig,
    ModernBertDecoderConfig,
    PhiConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmkd.losses.fused import fused_loss
from mmkd.models.backbone import allow_consumers, base_of, devices_of, full_head, head_of
from mmkd.models.heads import LMHead
from tests.helpers import VISION

# Tests reach into models by attribute, and nn.Module types none of those.
Model = Any

VOCAB, IMAGE_TOKEN = 61, 60
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama_tied": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "gemma2": lambda: Gemma2Config(**SHAPE, final_logit_softcapping=1.5),
    "gemma3_text": lambda: Gemma3TextConfig(**SHAPE, final_logit_softcapping=1.5),
    "cohere": lambda: CohereConfig(**SHAPE, logit_scale=0.3),
    "granite": lambda: GraniteConfig(**SHAPE, logits_scaling=3.0),
    "hyperclovax": lambda: HyperCLOVAXConfig(**SHAPE, logits_scaling=3.0),
    "falcon_h1": lambda: FalconH1Config(
        **SHAPE, lm_head_multiplier=0.3, mamba_d_ssm=16, mamba_n_heads=4, mamba_d_head=4, mamba_d_state=4
    ),
    "gpt2": lambda: GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64),
    # Its lm_head has a bias.
    "phi": lambda: PhiConfig(**SHAPE),
}
each_family = pytest.mark.parametrize("family", FAMILIES)


def prepared(model: Model) -> Model:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Fresh logits are near zero, where a softcap or a bias would not show.
            if "norm" not in name:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


def text_model(family: str = "llama", config: Any = None) -> Model:
    return prepared(AutoModelForCausalLM.from_config(config or FAMILIES[family](), dtype=torch.float32))


def llava() -> Model:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**SHAPE), image_token_index=IMAGE_TOKEN
    )
    return prepared(AutoModelForImageTextToText.from_config(config, dtype=torch.float32))


def text_inputs() -> dict[str, Tensor]:
    ids = torch.randint(3, IMAGE_TOKEN, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def image_inputs() -> dict[str, Tensor]:
    inputs = text_inputs()
    inputs["input_ids"][:, 1:5] = IMAGE_TOKEN
    inputs["attention_mask"][:] = 1
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return {**inputs, "pixel_values": pixels}


def all_log_probs(hidden: Tensor, head: LMHead) -> Tensor:
    return head.log_probs(hidden)


def gradients(model: Model, loss: Tensor) -> dict[str, Tensor]:
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(parameters, found, strict=True) if gradient is not None}


def mean_cross_entropy(log_probs: Tensor, ids: Tensor) -> Tensor:
    return -log_probs[:, :-1].gather(-1, ids[:, 1:, None]).mean()


# The head


@each_family
def test_head_and_last_hidden_state_give_the_logits_of_the_model(family):
    model, inputs = text_model(family), text_inputs()
    with torch.no_grad():
        hidden = model.base_model(**inputs).last_hidden_state
        expected = model(**inputs).logits.log_softmax(-1)
    torch.testing.assert_close(head_of(model).log_probs(hidden), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "family, scale, softcap",
    [
        ("llama", 1.0, None),
        ("gemma2", 1.0, 1.5),
        ("cohere", 0.3, None),
        ("granite", 1 / 3, None),
        ("hyperclovax", 3.0, None),
        ("falcon_h1", 0.3, None),
    ],
)
def test_scale_and_softcap_are_read_from_the_configuration(family, scale, softcap):
    head = head_of(text_model(family))
    assert head.scale == pytest.approx(scale)
    assert head.softcap == softcap


@pytest.mark.parametrize("family, tied", [("llama", False), ("llama_tied", True), ("gpt2", True)])
def test_head_is_the_models_own_parameter(family, tied):
    model = text_model(family)
    assert head_of(model).weight is model.lm_head.weight
    assert (head_of(model).weight is model.get_input_embeddings().weight) == tied
    assert full_head(model).weight is model.lm_head.weight


def test_head_is_read_anew_on_each_call():
    model = text_model()
    before = head_of(model)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(before.weight))
    assert head_of(model).weight is model.lm_head.weight
    assert head_of(model).weight is not before.weight


def test_head_of_a_vision_model_is_that_of_its_language_model():
    model = llava()
    assert head_of(model).weight is model.lm_head.weight
    assert head_of(model).vocab_size == VOCAB


def test_model_without_output_embeddings_is_refused_by_class_name():
    with pytest.raises(ValueError, match=r"LlamaModel has no output embeddings.*needs a model with an lm_head"):
        head_of(AutoModel.from_config(LlamaConfig(**SHAPE)))


def test_quantised_head_is_refused_with_what_to_do():
    model = text_model()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(VOCAB, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"lm_head of LlamaForCausalLM is quantised to torch\.int8.*skip_modules"):
        head_of(model)


def test_lora_on_the_head_is_refused_with_what_to_do():
    model = get_peft_model(text_model(), LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"lm_head carries a PEFT adapter.*Remove 'lm_head'.*modules_to_save"):
        head_of(model)


def test_lora_on_embeddings_is_refused_where_they_are_the_head():
    """Merged, it would be the head's too."""
    config = LoraConfig(target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    for tied in (True, False):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, tie_word_embeddings=tied))
        expected = pytest.raises(ValueError, match="share their weights with the lm_head") if tied else nullcontext()
        with expected:
            head_of(get_peft_model(model, config))


# Consumers


@each_family
def test_consumer_gets_hidden_states_and_head_that_give_the_models_logits(family):
    model, inputs = text_model(family), text_inputs()
    with torch.no_grad():
        expected = model(**inputs).logits.log_softmax(-1)
        allow_consumers(model)
        actual = model(**inputs, consumer=all_log_probs)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@each_family
def test_gradients_through_a_consumer_are_those_of_the_models_logits(family):
    model, inputs = text_model(family), text_inputs()
    expected = gradients(model, mean_cross_entropy(model(**inputs).logits.log_softmax(-1), inputs["input_ids"]))
    allow_consumers(model)
    loss = mean_cross_entropy(model(**inputs, consumer=all_log_probs), inputs["input_ids"])
    torch.testing.assert_close(gradients(model, loss), expected, rtol=1e-4, atol=1e-6)


def test_vision_model_gives_its_logits_and_gradients_to_a_consumer():
    model, inputs = llava(), image_inputs()
    log_probs = model(**inputs).logits.log_softmax(-1)
    expected = gradients(model, mean_cross_entropy(log_probs, inputs["input_ids"]))
    allow_consumers(model)
    actual = model(**inputs, consumer=all_log_probs)
    torch.testing.assert_close(actual, log_probs, rtol=1e-5, atol=1e-5)
    actual_gradients = gradients(model, mean_cross_entropy(actual, inputs["input_ids"]))
    torch.testing.assert_close(actual_gradients, expected, rtol=1e-4, atol=1e-6)
    assert any("vision" in name for name in actual_gradients)
    assert any("projector" in name for name in actual_gradients)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2"])
def test_fused_loss_in_a_consumer_trains_the_whole_model(family):
    model, inputs = text_model(family), text_inputs()
    ids = inputs["input_ids"]
    expected = gradients(model, mean_cross_entropy(model(**inputs).logits.log_softmax(-1), ids))
    allow_consumers(model)

    def cross_entropy(hidden: Tensor, head: LMHead) -> Tensor:
        rows, labels = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        return fused_loss(rows, head, labels, chunk_size=5).total / len(labels)

    actual = gradients(model, model(**inputs, consumer=cross_entropy))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_whatever_a_consumer_returns_comes_back():
    model, inputs = text_model(), text_inputs()
    allow_consumers(model)
    result = ({"token": torch.ones(())}, {"name": 3})
    assert model(**inputs, consumer=lambda hidden, head: result) is result


def test_consumer_runs_inside_the_forward_that_wrappers_hook():
    model, inputs, events = text_model(), text_inputs(), []
    allow_consumers(model)
    model.register_forward_pre_hook(lambda *_: events.append("before"))
    model.register_forward_hook(lambda *_: events.append("after"))
    model(**inputs, consumer=lambda hidden, head: events.append("consumer"))
    assert events == ["before", "consumer", "after"]


def test_consumer_runs_inside_the_heads_module_that_shards_are_gathered_for():
    model, inputs, events = text_model(), text_inputs(), []
    allow_consumers(model)
    model.lm_head.register_forward_pre_hook(lambda *_: events.append("before"))
    model.lm_head.register_forward_hook(lambda *_: events.append("after"))
    model(**inputs, consumer=lambda hidden, head: events.append("consumer"))
    assert events == ["before", "consumer", "after"]


def test_head_works_as_before_after_a_consumer_that_fails():
    model, inputs = text_model(), text_inputs()
    expected = model(**inputs).logits
    allow_consumers(model)
    with pytest.raises(ZeroDivisionError):
        model(**inputs, consumer=lambda hidden, head: 1 / 0)
    assert torch.equal(model(**inputs).logits, expected)
    assert "forward" not in vars(model.lm_head)


def test_consumer_keeps_no_cache():
    model, inputs, seen = text_model(), text_inputs(), []
    allow_consumers(model)
    model.base_model.register_forward_hook(lambda module, args, output: seen.append(output.past_key_values))
    model(**inputs, use_cache=True, consumer=all_log_probs)
    assert seen == [None]


@pytest.mark.parametrize("make", [text_model, llava])
def test_a_model_that_waits_on_the_cpu_may_be_set_to_flash_attention(make, monkeypatch):
    model = make()

    def on_a_gpu_only(*args, **kwargs):
        raise RuntimeError("FlashAttention only supports CUDA tensors")

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash", on_a_gpu_only)
    text = model.config.get_text_config()
    text._attn_implementation = "flash"
    chosen = [module.config._attn_implementation for module in model.modules() if isinstance(module, PreTrainedModel)]
    with pytest.raises(RuntimeError, match="only supports CUDA"):
        model(**text_inputs())
    allow_consumers(model)
    assert text._attn_implementation == "flash"
    assert chosen == [one.config._attn_implementation for one in model.modules() if isinstance(one, PreTrainedModel)]


@each_family
def test_forward_without_consumer_is_what_it_was(family):
    model, inputs = text_model(family), text_inputs()
    signature = inspect.signature(model.forward)
    with torch.no_grad():
        expected = model(**inputs, labels=inputs["input_ids"])
        allow_consumers(model)
        actual = model(**inputs, labels=inputs["input_ids"])
    assert type(actual) is type(expected)
    assert torch.equal(actual.logits, expected.logits)
    assert torch.equal(actual.loss, expected.loss)
    # What the Trainer and generate read to know which inputs a model takes.
    assert set(signature.parameters) <= set(inspect.signature(model.forward).parameters)


def test_generation_works_as_before():
    model, inputs = text_model(), text_inputs()
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**inputs, **settings)
    allow_consumers(model)
    assert torch.equal(model.generate(**inputs, **settings), expected)


def test_allowing_consumers_twice_changes_nothing():
    model, inputs = text_model(), text_inputs()
    allow_consumers(model)
    expected = model(**inputs, consumer=all_log_probs)
    allow_consumers(model)
    assert torch.equal(model(**inputs, consumer=all_log_probs), expected)
    assert torch.equal(model(**inputs).logits.log_softmax(-1), expected)


def test_copy_of_a_model_runs_with_its_own_weights():
    model, inputs = text_model(), text_inputs()
    allow_consumers(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        assert (twin(**inputs, consumer=lambda hidden, head: hidden) == 0).all()
        assert (twin(**inputs).logits == 0).all()


def test_gradient_checkpointing_changes_no_gradient():
    model, inputs = text_model().train(), text_inputs()
    expected = gradients(model, mean_cross_entropy(model(**inputs).logits.log_softmax(-1), inputs["input_ids"]))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    allow_consumers(model)
    loss = mean_cross_entropy(model(**inputs, consumer=all_log_probs), inputs["input_ids"])
    torch.testing.assert_close(gradients(model, loss), expected, rtol=1e-4, atol=1e-6)


# PEFT


def with_lora(**settings: Any) -> Model:
    torch.manual_seed(0)
    # Fresh adapters change nothing, hence random ones.
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    return get_peft_model(text_model(), config).eval()


def test_consumer_under_lora_sees_the_adapted_model():
    model, inputs = with_lora(), text_inputs()
    expected = model(**inputs).logits.log_softmax(-1)
    with model.disable_adapter():
        assert not torch.allclose(model(**inputs).logits.log_softmax(-1), expected, atol=1e-3)
    allow_consumers(model)
    torch.testing.assert_close(model(**inputs, consumer=all_log_probs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_gradients_under_lora_are_those_of_the_models_logits(modules_to_save):
    model, inputs = with_lora(modules_to_save=modules_to_save), text_inputs()
    expected = gradients(model, mean_cross_entropy(model(**inputs).logits.log_softmax(-1), inputs["input_ids"]))
    allow_consumers(model)
    loss = mean_cross_entropy(model(**inputs, consumer=all_log_probs), inputs["input_ids"])
    actual = gradients(model, loss)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert all("lora" in name or "modules_to_save" in name for name in actual)
    assert any("lm_head" in name for name in actual) == (modules_to_save is not None)


def test_base_of_finds_the_model_under_the_wrapper():
    model = text_model()
    assert base_of(model) is model
    assert base_of(get_peft_model(model, LoraConfig(target_modules=["q_proj"]))) is model


def test_devices_of_are_those_of_the_parameters():
    assert devices_of(text_model()) == {torch.device("cpu")}


# Heads that are more than a matrix


def cohere_vision() -> Model:
    config = Cohere2VisionConfig(
        vision_config=SiglipVisionConfig(**VISION), text_config=Cohere2Config(**SHAPE, logit_scale=0.3)
    )
    return prepared(AutoModelForImageTextToText.from_config(config, dtype=torch.float32))


UNUSUAL = {
    # Its backbone goes by another name than base_model_prefix says.
    "llama4_text": lambda: text_model(
        config=Llama4TextConfig(**SHAPE, intermediate_size_mlp=24, num_local_experts=2, num_experts_per_tok=1)
    ),
    # A dense layer and a norm stand between the backbone and the output embeddings.
    "modernbert_decoder": lambda: text_model(config=ModernBertDecoderConfig(**SHAPE, bos_token_id=1, eos_token_id=2)),
    # The vision model does not scale its logits, though its text_config has a logit_scale.
    "cohere2_vision": cohere_vision,
}


@pytest.mark.parametrize("family", UNUSUAL)
def test_unusual_head_is_right_or_refused_and_never_silently_wrong(family):
    model, inputs = UNUSUAL[family](), text_inputs()
    with torch.no_grad():
        expected = model(**inputs).logits.log_softmax(-1)
        try:
            allow_consumers(model)
            actual = model(**inputs, consumer=all_log_probs)
        except ValueError:
            return
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
