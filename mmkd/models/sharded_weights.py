"""Models sharded over ranks by FSDP2 or ZeRO-3: the student that accelerate prepares, and the frozen teacher."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from mmkd.errors import UserError
from mmkd.seams.accelerate_seam import count_ranks_as_gpus, shard_by_fsdp2
from mmkd.seams.deepspeed_seam import gathered as gathered_parameters
from mmkd.seams.deepspeed_seam import kept_whole
from mmkd.seams.peft_seam import is_copied
from mmkd.seams.torch_seam import settle_root

from .backbone import base_of
from .heads import LMHead


def allow_fsdp_on_cpu(sharded: bool) -> None:
    """Lets accelerate shard over ranks without a GPU where a run is `sharded`; call it before the accelerator exists.

    accelerate would otherwise train whole copies there, and not say so.
    """
    sharded = sharded or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if sharded:
        count_ranks_as_gpus()


def settle_fsdp(accelerator: Accelerator, checkpoint_activations: bool) -> None:
    """Sets accelerate's FSDP plugin up for training. Raises UserError for FSDP 1.

    With `checkpoint_activations` FSDP checkpoints them, which gathers every layer once less than the model's own way.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    if not accelerator.is_fsdp2:
        raise UserError(
            "The fused loss does not run under FSDP 1. Set fsdp_version: 2 in the accelerate config, or use "
            "accelerate_config fsdp2.",
            because="not built",
        )
    plugin: Any = accelerator.state.fsdp_plugin
    plugin.activation_checkpointing = plugin.activation_checkpointing or checkpoint_activations
    if plugin.mixed_precision_policy is not None:
        # By default accelerate casts the losses that the forward returns to bf16, which rounds the scale of the
        # gradient to 8 bits, and sums gradients over ranks in half precision.
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
        )


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each rank holds only a part of each weight."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        plugin: Any = accelerator.state.deepspeed_plugin
        return plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP


def loads_on_one_rank(accelerator: Accelerator) -> bool:
    """Whether only the first rank of a machine reads weights from disk, and the others receive them by sharding."""
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    return plugin is not None and bool(plugin.cpu_ram_efficient_loading)


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether the weights are packed into integers."""
    return bool(getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None))


def cut_by_layers(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Tells FSDP by which layers to shard the student, where its configuration does not name them.

    accelerate would take every class that transformers ever wants whole, of which a vision-language model has some.
    Raises UserError for a student that FSDP cannot cut: trained weights of several types, or a copy of tied
    embeddings.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    if isinstance(model, PeftModel) and _unties(model):
        raise UserError(
            "modules_to_save copies embeddings that are the lm_head too, and FSDP2 would tie them again: the "
            "adapter would not be the student that was trained. Remove embed_tokens and lm_head from it, or use ddp.",
            because="upstream",
        )
    types = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    if len(types) > 1 and accelerator.mixed_precision == "no":
        raise UserError(
            f"The student's trained weights are of {' and '.join(sorted(map(str, types)))}, which FSDP2 cannot lay "
            "side by side. Load it in one type, or set bf16: true.",
            because="upstream",
        )
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = _layers_of(model)


def _unties(model: PeftModel) -> bool:
    """Whether PEFT trains a copy of embeddings or of a head that share their weights."""
    base = base_of(model)
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    tied = bool(getattr(base.config.get_text_config(), "tie_word_embeddings", False))
    return tied and any(is_copied(end) for end in ends)


def is_cut(model: torch.nn.Module) -> bool:
    """Whether FSDP2 has sharded a model already."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def checkpoint_under_adapters(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Lets a student with adapters checkpoint its activations itself, instead of FSDP.

    For its own checkpointing FSDP wraps layers, below which PEFT silently finds no adapter to save.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.activation_checkpointing and isinstance(model, PeftModel):
        plugin.activation_checkpointing = False
        base_of(model).activation_checkpointing_enable()


def shard_frozen(model: PreTrainedModel, accelerator: Accelerator) -> torch.nn.Module:
    """The model sharded over the ranks by FSDP2, as accelerate does it for the student."""
    plugin: Any = accelerator.state.fsdp_plugin
    # Restored below, or the plugin would wrap the student by this model's layers.
    policy, layers = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
    plugin.transformer_cls_names_to_wrap = _layers_of(model)
    sharded = shard_by_fsdp2(accelerator, model)
    plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = policy, layers
    return sharded


def _layers_of(model: torch.nn.Module) -> list[str]:
    """The classes of the model's blocks: classes in `_no_split_modules` that occur in lists of modules."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    whole = set(getattr(model, "_no_split_modules", None) or ())
    return sorted({type(block).__name__ for blocks in lists for block in blocks} & whole)


def reshard(model: torch.nn.Module) -> None:
    """Frees the weights that FSDP2 keeps gathered from forward to backward; a frozen model has no backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def whole_on_every_rank(model: torch.nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """In it every rank holds all weights of a sharded student, however often and however far each rank runs it.

    All ranks must enter it together. A student that is not sharded stays as it is.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    engine = _zero3_engine(accelerator)
    if engine is not None:
        with kept_whole(engine):
            yield
        return
    if isinstance(model, FSDPModule):
        settle_root(model)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            # As accelerate sharded it.
            part.set_reshard_after_forward(bool(plugin.reshard_after_forward), recurse=False)
            part.reshard()


@contextmanager
def called(model: torch.nn.Module, accelerator: Accelerator) -> Iterator[Any]:
    """What to call in it to run a student outside of a training step, layer by layer where it is sharded."""
    engine = _zero3_engine(accelerator)
    # FSDP2 wants its root called, which is PEFT's wrapper where there is one.
    yield model if engine is None else engine
    reshard(model)


def _zero3_engine(accelerator: Accelerator) -> Any:
    """What DeepSpeed has wrapped the student in, where that is cut by ZeRO-3."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED or not is_sharded(accelerator):
        return None
    wrapper: Any = accelerator.deepspeed_engine_wrapped
    return wrapper.engine


def whole_weights(
    model: torch.nn.Module, accelerator: Accelerator, trained_only: bool = False
) -> dict[str, torch.Tensor] | None:
    """The whole weights of a sharded model, on the CPU of the first rank; empty on others; all ranks must call it.

    None if every rank holds the whole model. `trained_only` leaves out what is frozen.
    """
    if not is_sharded(accelerator):
        return None
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _gathered_by_zero(model, accelerator, trained_only)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    return cast(dict[str, torch.Tensor], get_model_state_dict(model, options=options))


def _gathered_by_zero(model: torch.nn.Module, accelerator: Accelerator, trained_only: bool) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if trained_only and not tensor.requires_grad:
            continue
        # One at a time: the whole model need not fit on a device.
        with gathered_parameters([tensor] if isinstance(tensor, torch.nn.Parameter) else []):
            if accelerator.is_main_process:
                weights[name] = tensor.detach().to("cpu", copy=True)
    return weights


def gathered(head: LMHead) -> LMHead:
    """A copy of a sharded head; call it in the head's module's forward, where the head is whole."""
    bias = None if head.bias is None else head.bias.detach().clone()
    return replace(head, weight=head.weight.detach().clone(), bias=bias)
