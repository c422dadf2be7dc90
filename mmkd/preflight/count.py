"""FLOPs and bytes of a model's passes, counted on tensors without data, for sizes that do not fit on this machine."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from mmkd.models.backbone import base_of
from mmkd.models.parts import part_of


@dataclass(frozen=True)
class Passes:
    """A forward and a backward pass of a model without its head, over a batch of rows of one length."""

    forward: float
    """FLOPs."""
    backward: float
    """FLOPs, without those that only frozen weights would need; 0 for a model that does not train."""
    saved: float
    """Bytes that the forward pass keeps for the backward pass: activations, and weights that autocast has cast."""
    layer_inputs: float
    """Bytes of the inputs of all layers, which are all that activation checkpointing keeps."""
    layers: int

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(
            self.forward + other.forward,
            self.backward + other.backward,
            self.saved + other.saved,
            self.layer_inputs + other.layer_inputs,
            self.layers + other.layers,
        )


def count_passes(
    model: PreTrainedModel | PeftModel, rows: int, tokens: int, images: float, bf16: bool, train: bool
) -> Passes:
    """What a model's body does with `rows` rows of `tokens` tokens, image tokens among them, and `images` images each.

    The model has shapes and no data (meta tensors) and says by `requires_grad` what is trained. Its decoder is run;
    attention counts as SDPA computes it, its causal half not left out. A vision tower counts by its linear layers.
    """
    base = base_of(model)
    width = base.config.get_text_config().hidden_size
    counted = _decoder(base, rows, tokens, width, bf16, train)
    return counted + _tower(base, rows * images, train) if images else counted


def _decoder(base: PreTrainedModel, rows: int, tokens: int, width: int, bf16: bool, train: bool) -> Passes:
    with FakeTensorMode(allow_non_fake_inputs=True):
        decoder: Any = base.get_decoder()
        decoder.to_empty(device="cpu")
        decoder.train(train)
        weights = {tensor.untyped_storage()._cdata for tensor in (*decoder.parameters(), *decoder.buffers())}
        saved: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage()._cdata not in weights:
                saved[tensor.untyped_storage()._cdata] = tensor
            return tensor

        # Leaves that need a gradient, as the embeddings or an adapter before the first layer would make them.
        embedded = torch.zeros(rows, tokens, width, dtype=decoder.dtype, requires_grad=train)
        modes: list[AbstractContextManager] = [
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor) if train else torch.no_grad(),
        ]
        with modes[0], modes[1]:
            hidden, forward = counted(
                lambda: decoder(inputs_embeds=embedded, use_cache=False, position_ids=None).last_hidden_state
            )
        backward = counted(lambda: hidden.sum().backward())[1] if train else 0.0
        size = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
        layers = base.config.get_text_config().num_hidden_layers
        return Passes(forward, backward, size, layers * embedded.untyped_storage().nbytes() if train else 0.0, layers)


def counted(function: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and its FLOPs."""
    attention = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        result = function()
    return result, float(counter.get_total_flops())


def _attention_flops(query: torch.Size, key: torch.Size, *rest: Any, **kwargs: Any) -> int:
    """Two products of every query with every key; heads of keys that queries share count as often as they are used."""
    batch, heads, queries, width = query
    return 4 * batch * heads * queries * key[2] * width


def _attention_backward_flops(gradient: torch.Size, query: torch.Size, key: torch.Size, *rest: Any, **_: Any) -> int:
    """Five products instead of two: the scores once more, and four gradients."""
    return 5 * _attention_flops(query, key) // 2


def _tower(base: PreTrainedModel, images: float, train: bool) -> Passes:
    """Every linear layer or patch embedding outside of the decoder, over all patches of all images."""
    vision = base.config.vision_config  # pyright: ignore[reportAttributeAccessIssue]
    patches = images * (vision.image_size // vision.patch_size) ** 2
    weights = [
        module.weight
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and part_of(f"{name}.weight") != "language_model"
    ]
    forward = 2 * patches * sum(weight.numel() for weight in weights)
    trained = [weight for weight in weights if weight.requires_grad] if train else []
    if not trained:
        return Passes(forward, 0.0, 0.0, 0.0, 0)
    backward = forward + 2 * patches * sum(weight.numel() for weight in trained)
    # 34 bytes x width per patch and layer: Korthikanti et al. 2022, attention scores not kept.
    width, layers = vision.hidden_size, vision.num_hidden_layers
    return Passes(forward, backward, 34 * patches * width * layers, 2 * patches * width * layers, layers)
