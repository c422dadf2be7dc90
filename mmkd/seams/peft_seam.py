"""What mmkd borrows of PEFT beyond its documentation: its classes of layers, and the switch in each of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
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
