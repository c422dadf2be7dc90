"""What mmkd borrows of PEFT beyond its documentation: its classes of layers, and the switch in each of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper


def is_adapted(module: Any) -> bool:
    """Whether a module is a layer with an adapter."""
    return isinstance(module, BaseTunerLayer)


def is_copied(module: Any) -> bool:
    """Whether a module is one that PEFT trains a copy of: `modules_to_save`, `trainable_token_indices`."""
    return isinstance(module, AuxiliaryTrainingWrapper)


@contextmanager
def adapters_off(model: torch.nn.Module) -> Iterator[None]:
    """In it the model computes without its adapters, and with the base's own copy of what PEFT trains whole.

    `PeftModel.disable_adapter` would also freeze the adapters and let them train again, on which DDP and FSDP have
    built their hooks.
    """
    layers: list[Any] = [module for module in model.modules() if is_adapted(module) or is_copied(module)]
    switches = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, switch in zip(layers, switches, strict=True):
            layer._disable_adapters = switch


def adapts_weights_of_its_own(model: PeftModel) -> bool:
    """Whether the model without its adapters is the one that they were added to.

    Some ways to begin (PiSSA, OLoRA, CorDA, LoftQ) take out of the weights what the adapter then adds.
    """
    ways = [getattr(config, "init_lora_weights", True) for config in model.peft_config.values()]
    return all(not isinstance(way, str) or way in ("gaussian", "eva", "orthogonal") for way in ways)


def is_lora(module: Any) -> bool:
    """Whether a module is a linear layer with LoRA, on a base that is a plain `nn.Linear`."""
    return isinstance(module, LoraLinear) and type(module.get_base_layer()) is torch.nn.Linear


def adapts_a_parameter(module: Any) -> bool:
    """Whether a module has LoRA on a weight that is no layer, such as that of experts: it adds to it in each pass."""
    return isinstance(module, ParamWrapper)


def merges_otherwise(module: Any) -> str | None:
    """What of a LoRA layer is more than a change of its weight, by the key that asks for it; None: nothing."""
    if any(not isinstance(variant, DoraLinearVariant) for variant in module.lora_variant.values()):
        return "its variant of LoRA"
    return "lora_bias" if any(module.lora_bias.values()) else None


def merged_weight(module: Any) -> torch.Tensor:
    """The weight of a LoRA layer as merging leaves it, with gradients of the adapter; that of its base if it is off.

    The sum is rounded to the type of the base, as `merge_and_unload` rounds it.
    """
    weight = base = module.get_base_layer().weight
    if module.disable_adapters or module.merged:
        return weight
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        delta = module.get_delta_weight(name)
        changed = weight + delta
        if name in module.lora_variant:
            # As DoRA's own forward pass, which takes the norm as a constant.
            magnitude = module.lora_magnitude_vector[name]
            norm = magnitude.get_weight_norm(base, delta, scaling=1).detach()
            changed = (magnitude.weight / norm).view(-1, 1) * changed
        weight = changed.to(weight.dtype)
    return weight


def drops_out(module: Any) -> bool:
    """Whether a LoRA layer drops a part of what its adapter reads."""
    return any(isinstance(dropout, torch.nn.Dropout) for dropout in module.lora_dropout.values())


def copies_of(wrapper: Any) -> list[torch.nn.Module]:
    """The module that PEFT trains a copy of, and its copies."""
    return [wrapper.original_module, *getattr(wrapper, "modules_to_save", {}).values()]
