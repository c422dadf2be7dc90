"""What mmkd borrows of DeepSpeed and its attributes of parameters; DeepSpeed is imported where it is used only."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.integrations import deepspeed as integration

from mmkd.errors import UserError


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has cut a parameter: `deepspeed.zero.Init` leaves its mark on those that it has."""
    return hasattr(parameter, "ds_id")


def weights_of(parameter: Tensor) -> int:
    """How many weights a parameter has, also one that ZeRO-3 has cut, which then says that it has none."""
    return getattr(parameter, "ds_numel", parameter.numel())


def shape_of(parameter: Tensor) -> torch.Size:
    """The shape of a parameter, also of one that ZeRO-3 has cut, which then has none."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def gathered(parameters: Sequence[Tensor]) -> AbstractContextManager:
    """Partitioned parameters are whole in it.

    A tied embedding is gathered already; gathering it again would partition it on exit while it is in use.
    """
    if not parameters:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters  # pyright: ignore[reportMissingImports]
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus  # pyright: ignore[reportMissingImports]

    absent = [part for part in parameters if getattr(part, "ds_status", None) != ZeroParamStatus.AVAILABLE]
    return GatheredParameters(absent) if absent else nullcontext()


@contextmanager
def kept_whole(engine: Any) -> Iterator[None]:
    """All weights of an engine's model are whole in it, also after a forward pass; all ranks must enter it together.

    The engine's hooks would cut a layer up again once it has run, in the midst of what is gathered; trl takes them off
    in the same way to generate. It leaves the one that compares all ranks before each pass, of which a rank with more
    to generate makes more.
    """
    from deepspeed.runtime.zero import GatheredParameters  # pyright: ignore[reportMissingImports]
    from trl.models.utils import add_hooks, remove_hooks

    offload = engine.optimizer.parameter_offload
    compare = offload.module._forward_pre_hooks[offload.fwd_pre_hook.id]
    with GatheredParameters(list(engine.parameters())):
        remove_hooks(engine)
        offload.fwd_pre_hook.remove()
        try:
            yield
        finally:
            # Before the others, as it was.
            offload.fwd_pre_hook = offload.module.register_forward_pre_hook(compare)
            add_hooks(engine)


def whole_weights(checkpoint: Path) -> dict[str, Any]:
    """The weights of a checkpoint of ZeRO in float32; its documented way is a script inside the checkpoint."""
    from deepspeed.utils.zero_to_fp32 import (  # pyright: ignore[reportMissingImports]
        get_fp32_state_dict_from_zero_checkpoint,
    )

    weights: Any = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
    return weights


def is_zero3() -> bool:
    """Whether transformers has set DeepSpeed's ZeRO-3 up in this process."""
    return integration.is_deepspeed_zero3_enabled()


@contextmanager
def without_zero3() -> Iterator[None]:
    """Models that are loaded or made in it are whole on the process that does so, whatever DeepSpeed is set up for."""
    before = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = before


@contextmanager
def whole_for_now(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Partitioned parameters have their whole data in it, by no way that ZeRO-3 keeps books of.

    `GatheredParameters` leaves those alone that are on their way already, prefetched for the backward pass, and would
    put them away on exit. Here they get other data for a while, and then their own again.
    """
    absent: list[Any] = [part for part in parameters if is_partitioned(part)]
    if not absent:
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus  # pyright: ignore[reportMissingImports]

    absent = [part for part in absent if part.ds_status != ZeroParamStatus.AVAILABLE]
    before = [(part.data, part.ds_status) for part in absent]
    for part in absent:
        part.data, part.ds_status = _whole(part), ZeroParamStatus.AVAILABLE
    try:
        yield
    finally:
        for part, (data, status) in zip(absent, before, strict=True):
            part.data, part.ds_status = data, status


def _whole(part: Any) -> Tensor:
    share = part.ds_tensor.data.to(part.device)
    ranks = torch.distributed.get_world_size(part.ds_process_group)
    if share.dtype != part.dtype or share.numel() * ranks < part.ds_numel:
        raise UserError(
            "combine: gradmag needs the weights of the last layer, which DeepSpeed has quantised or put on a disk. "
            "Set combine: weights, or leave zero_quantized_weights and offload_param: nvme out of DeepSpeed's config.",
            because="not built",
        )
    flat = torch.empty(share.numel() * ranks, dtype=share.dtype, device=share.device)
    torch.distributed.all_gather_into_tensor(flat, share.contiguous(), group=part.ds_process_group)
    return flat[: part.ds_numel].view(part.ds_shape)


def set_number(parameter: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """Changes a small parameter that DeepSpeed trains, and the copy of it that its optimizer goes on from."""
    from deepspeed.runtime.zero import GatheredParameters  # pyright: ignore[reportMissingImports]
    from deepspeed.utils import (  # pyright: ignore[reportMissingImports]
        safe_get_full_fp32_param,
        safe_set_full_fp32_param,
    )

    kept = safe_get_full_fp32_param(parameter)
    if kept is not None:
        safe_set_full_fp32_param(parameter, change(kept).to(kept))
    with GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
        parameter.copy_(change(parameter))
