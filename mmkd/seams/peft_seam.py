"""What mmkd borrows of PEFT beyond its documentation: the classes by which its layers are told from others."""

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper


def is_adapted(module: Any) -> bool:
    """Whether a module is a layer with an adapter."""
    return isinstance(module, BaseTunerLayer)


def is_copied(module: Any) -> bool:
    """Whether a module is one that PEFT trains a copy of: `modules_to_save`, `trainable_token_indices`."""
    return isinstance(module, AuxiliaryTrainingWrapper)
