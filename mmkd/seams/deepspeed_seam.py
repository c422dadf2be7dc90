"""What mmkd borrows of DeepSpeed and its attributes of parameters; DeepSpeed is imported where it is used only."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has cut a parameter: `deepspeed.zero.Init` leaves its mark on those that it has."""
    return hasattr(parameter, "ds_id")


def gathered(parameters: Sequence[Tensor]) -> AbstractContextManager:
    """Partitioned parameters are whole in it.

    A tied embedding is gathered already; gathering it again would partition it on exit while it is in use.
    """
    if not parameters:
        return nullcontext()
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus  # pyright: ignore[reportMissingImports]
    from deepspeed.zero import GatheredParameters  # pyright: ignore[reportMissingImports]

    absent = [part for part in parameters if getattr(part, "ds_status", None) != ZeroParamStatus.AVAILABLE]
    return GatheredParameters(absent) if absent else nullcontext()


def whole_weights(checkpoint: Path) -> dict[str, Any]:
    """The weights of a checkpoint of ZeRO in float32; its documented way is a script inside the checkpoint."""
    from deepspeed.utils.zero_to_fp32 import (  # pyright: ignore[reportMissingImports]
        get_fp32_state_dict_from_zero_checkpoint,
    )

    weights: Any = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
    return weights


def is_zero3() -> bool:
    """Whether transformers has set DeepSpeed's ZeRO-3 up in this process."""
    return is_deepspeed_zero3_enabled()
