"""LastBlock: a second pass of the last block gives the gradients that autograd finds in the first one."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from mmkd.losses.combine import gradients_of
from mmkd.models.backbone import allow_consumers, last_layer
from mmkd.models.heads import LMHead
from mmkd.models.last_block import LastBlock
from tests.models.test_backbone import SHAPE, VOCAB, each_family, text_model

IDS = torch.arange(12).view(2, 6) * 3 % VOCAB


def both(model: Any, block: LastBlock) -> tuple[Tensor, Tensor]:
    """The gradients of two losses in the last block: by the second pass, and by autograd through the first one."""

    def consumer(hidden: Tensor, head: LMHead) -> tuple[Tensor, Tensor]:
        block.ends_in(hidden)
        losses = [head.log_probs(hidden).square().mean(), hidden.sin().sum()]
        trained = [parameter for parameter in last_layer(model).parameters() if parameter.requires_grad]
        return block.gradients_of(losses), gradients_of(losses, trained)

    with block.recording():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), consumer=consumer)


@each_family
def test_families(family: str) -> None:
    model = text_model(family)
    allow_consumers(model)
    again, expected = both(model.train(), LastBlock(model))
    assert expected.norm() > 0
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_and_checkpointed_activations(checkpointing: bool) -> None:
    torch.manual_seed(0)
    base: PreTrainedModel = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, attention_dropout=0.2))
    settings = {"r": 2, "lora_dropout": 0.5, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}
    model: Any = get_peft_model(base, LoraConfig(**settings))
    allow_consumers(model)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    block = LastBlock(model)
    for _ in range(2):
        again, expected = both(model.train(), block)
        torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-6)


def test_what_follows_the_last_block_otherwise_is_refused() -> None:
    model = text_model("llama")
    allow_consumers(model)
    own = model.model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * 3
        return output

    model.model.forward = scaled
    with pytest.raises(ValueError, match="does not run as its decoder's last block"):
        both(model.train(), LastBlock(model))
