"""FLOPs and bytes of a model's passes, counted on tensors without data, for sizes that do not fit on this machine."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig, PreTrainedModel

from mmkd.models.backbone import base_of
from mmkd.models.parts import part_of
from mmkd.seams.torch_seam import cpu_attention_flops, storage_key, without_data


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


@dataclass(frozen=True)
class ImageCounts:
    """The number of images of a batch, and of the tokens of their text that stand for them."""

    images: float
    tokens: float

    def patches(self, vision: Mapping[str, Any]) -> float:
        """The patches that a tower with this config reads."""
        if "image_size" not in vision:
            # Images of any size: each token stands for a square of patches.
            return self.tokens * vision["spatial_merge_size"] ** 2
        size, patch = (_sides(vision[name]) for name in ("image_size", "patch_size"))
        return self.images * (size[0] // patch[0]) * (size[1] // patch[1])


def _sides(size: int | Sequence[int]) -> Sequence[int]:
    return (size, size) if isinstance(size, int) else size


def count_passes(
    model: PreTrainedModel | PeftModel,
    rows: int,
    tokens: int,
    pictures: ImageCounts,
    bf16: bool,
    train: bool,
    flops: bool = True,
) -> Passes:
    """What a model's body does with `rows` rows of `tokens` tokens, image tokens among them, and all their pictures.

    The model has shapes and no data (meta tensors) and says by `requires_grad` what is trained. Its decoder is run;
    attention counts as SDPA computes it, its causal half not left out. A vision tower counts by its linear layers.
    Without `flops` only what is saved is counted.
    """
    base = base_of(model)
    batch = torch.Size((rows, tokens, base.config.get_text_config().hidden_size))
    passes = _decoder(base, batch, bf16, train, flops)
    return passes + _tower(base, pictures, train) if pictures.images else passes


def _decoder(base: PreTrainedModel, batch: torch.Size, bf16: bool, train: bool, flops: bool) -> Passes:
    config = base.config.get_text_config()
    decoder: Any = base.get_decoder()
    count = config.num_hidden_layers
    if not (train or flops):
        return Passes(0.0, 0.0, 0.0, 0.0, count)
    with without_data():
        name = _equal_layers(decoder, config)
        if name is None:
            decoder.to_empty(device="cpu")
            return _run(decoder, batch, bf16, train, flops, count)
        # Each layer after the first adds the same.
        layers = getattr(decoder, name)[:2]
        setattr(decoder, name, layers)
        decoder.to_empty(device="cpu")
        two_layers = _run(decoder, batch, bf16, train, flops, 2)
        setattr(decoder, name, layers[:1])
        one_layer = _run(decoder, batch, bf16, train, flops, 1)
        pairs = zip(astuple(one_layer), astuple(two_layers), strict=True)
        return Passes(*(first + (count - 1) * (both - first) for first, both in pairs))


def _equal_layers(decoder: nn.Module, config: PreTrainedConfig) -> str | None:
    """The name of the decoder's layers where there are two or more and all are alike."""
    kinds = {*(config.to_dict().get("layer_types") or [])}
    for name, layers in decoder.named_children():
        if isinstance(layers, nn.ModuleList) and len(layers) == config.num_hidden_layers > 1 and len(kinds) < 2:
            return name if len({*map(_shapes, layers)}) == 1 else None
    return None


def _shapes(layer: nn.Module) -> tuple[Any, ...]:
    """What decides how much a layer computes and saves."""
    parts = layer.named_parameters()
    return type(layer), *((name, part.shape, part.dtype, part.requires_grad) for name, part in parts)


def _run(decoder: Any, batch: torch.Size, bf16: bool, train: bool, flops: bool, layers: int) -> Passes:
    """What a decoder of so many layers does with a batch [rows, tokens, width] of embeddings."""
    decoder.train(train)
    weights = {storage_key(tensor) for tensor in (*decoder.parameters(), *decoder.buffers())}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if storage_key(tensor) not in weights:
            saved[storage_key(tensor)] = tensor
        return tensor

    # Leaves that need a gradient, as the embeddings or an adapter before the first layer would make them.
    embedded = torch.zeros(batch, dtype=decoder.dtype, requires_grad=train)
    kept: AbstractContextManager = torch.no_grad()
    if train:
        kept = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)

    def forward() -> Tensor:
        return decoder(inputs_embeds=embedded, use_cache=False, position_ids=None).last_hidden_state

    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), kept:
        hidden, forward_flops = counted(forward) if flops else (forward(), 0.0)
    backward_flops = counted(lambda: hidden.sum().backward())[1] if train and flops else 0.0
    size = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    inputs = layers * embedded.untyped_storage().nbytes() if train else 0.0
    return Passes(forward_flops, backward_flops, size, inputs, layers)


def counted(function: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and its FLOPs."""
    attention = cpu_attention_flops(_attention_flops, _attention_backward_flops)
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


def _tower(base: PreTrainedModel, pictures: ImageCounts, train: bool) -> Passes:
    """Every linear layer or patch embedding outside of the decoder, over all patches of all images."""
    vision = base.config.vision_config.to_dict()  # pyright: ignore[reportAttributeAccessIssue]
    patches = pictures.patches(vision)
    weights = [
        module.weight
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) and part_of(f"{name}.weight") != "language_model"
    ]
    forward = 2 * patches * sum(weight.numel() for weight in weights)
    trained = [weight for weight in weights if weight.requires_grad] if train else []
    if not trained:
        return Passes(forward, 0.0, 0.0, 0.0, 0)
    backward = forward + 2 * patches * sum(weight.numel() for weight in trained)
    # 34 bytes x width per patch and layer: Korthikanti et al. 2022, attention scores not kept.
    width = vision.get("embed_dim", vision["hidden_size"])
    layers = vision["num_hidden_layers"] if "num_hidden_layers" in vision else vision["depth"]
    return Passes(forward, backward, 34 * patches * width * layers, 2 * patches * width * layers, layers)
