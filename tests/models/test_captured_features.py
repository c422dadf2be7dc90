"""What modules compute in a forward pass, by their names, whatever is wrapped around them."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig

from mmkd.models.backbone import allow_consumers
from mmkd.models.captured_features import attention_map_of, blocks_of, capturing, feature_of, modules_of
from tests.families import FAMILIES, made, model_of
from tests.models.test_backbone import SHAPE, VOCAB

IDS = torch.arange(12).view(2, 6) * 3 % VOCAB


def llama(layers: int = 5, **settings: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**SHAPE, "num_hidden_layers": layers}, **settings))


def hooks_of(model: Any) -> int:
    """How many hooks there are; transformers adds its own where hidden states are asked for."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_outputs_and_inputs_are_those_of_the_pass_and_nothing_outlives_it() -> None:
    model, names = llama(), ["model.layers.1", "model.layers.2:input", "model.norm"]
    expected = model(IDS, output_hidden_states=True).hidden_states
    hooks = hooks_of(model)
    with capturing(model, names) as captured:
        model(IDS)
        features = [feature_of(captured[name]) for name in names]
        assert list(captured) == names
    for feature, states in zip(features, (expected[2], expected[2], expected[-1]), strict=True):
        assert feature is not None
        torch.testing.assert_close(feature, states)
    assert not captured
    assert hooks_of(model) == hooks


@pytest.mark.parametrize("lora", [False, True])
def test_gradients_below_checkpointing_are_those_without(lora: bool) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = llama().train()
        if lora:
            settings = {"r": 2, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}
            torch.manual_seed(1)
            model = get_peft_model(model, LoraConfig(**settings))
        allow_consumers(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with capturing(model, ["model.layers.2", "model.layers.3.mlp"]) as captured:

            def consumer(hidden: Tensor, head: Any) -> Tensor:
                features = [feature_of(value) for value in captured.values()]
                return torch.stack([feature.sin().sum() for feature in features if feature is not None]).sum()

            loss = model(input_ids=IDS, consumer=consumer)
        loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == len(checkpointed) > 0
    torch.testing.assert_close(checkpointed, plain)


def test_wrappers_do_not_change_names() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self._checkpoint_wrapped_module = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return checkpoint(self._checkpoint_wrapped_module, *args, use_reentrant=False, **kwargs)

    model = llama()
    expected = model(IDS, output_hidden_states=True).hidden_states[2]
    model.model.layers[1] = Wrapper(model.model.layers[1])

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = model

    with capturing(Outer(), ["model.layers.1", "model.layers.1.mlp"]) as captured:
        model(IDS)
        feature = feature_of(captured["model.layers.1"])
        assert feature is not None
        torch.testing.assert_close(feature, expected)


def test_attention_maps_are_there_where_they_are_computed() -> None:
    for attention, present in (("eager", True), ("sdpa", False)):
        model = llama(attn_implementation=attention)
        with capturing(model, ["model.layers.0.self_attn"]) as captured:
            model(IDS)
            weights = attention_map_of(captured["model.layers.0.self_attn"])
        assert (weights is not None) == present
        if weights is not None:
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 6))


def test_every_nth_spreads_over_the_depth_and_ends_with_the_last_block() -> None:
    numbers = {
        name: [int(block.split(".")[-1]) for block in modules_of(llama(10), name)]
        for name in ("every_nth", "every_3rd", "every_1", "every_10th")
    }
    assert numbers == {
        "every_nth": [1, 4, 7, 9],
        "every_3rd": [0, 3, 6, 9],
        "every_1": [*range(10)],
        "every_10th": [9],
    }
    assert len(modules_of(llama(2), "every_nth")) == 2
    with pytest.raises(ValueError, match="one in 11 blocks"):
        modules_of(llama(10), "every_11th")


def test_names_may_be_cut_at_the_front_and_unknown_ones_are_told_the_near() -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert modules_of(model, "layers.3") == ["model.layers.3"]
    assert modules_of(model, "model.norm:input") == ["model.norm:input"]
    with pytest.raises(ValueError, match=r"several names.*model.layers.0.mlp, model.layers.1.mlp"):
        modules_of(model, "mlp")
    with pytest.raises(ValueError, match=r"no module 'model.layer.3'.*model.layers.3"):
        modules_of(model, "model.layer.3")
    for shorthand in ("tower", "projector", "deepstack"):
        with pytest.raises(ValueError, match="LlamaForCausalLM has none"):
            modules_of(model, shorthand)
    with pytest.raises(ValueError, match="no module 'nothing'"), capturing(model, ["nothing"]):
        pass


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_vision_language_models(family: str) -> None:
    model = model_of(made(family)[0], 0)
    (tower,), (projector,) = modules_of(model, "tower"), modules_of(model, "projector")
    assert tower == f"{projector}:input"
    assert all("language_model" in block or "text_model" in block for block in blocks_of(model))
    if family == "Qwen3-VL":
        assert modules_of(model, "deepstack") == ["model.visual.deepstack_merger_list.0"]
