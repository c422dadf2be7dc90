"""What mmkd borrows of torch beyond its documentation."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule


def cpu_has_products_of(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of bfloat16 or float16 on this CPU, within what ONEDNN_MAX_CPU_ISA allows.

    torch has no public name for it.
    """
    ops = torch.ops.mkldnn
    return bool(ops._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else ops._is_mkldnn_fp16_supported())


def without_data() -> AbstractContextManager:
    """Tensors in it have shapes and no data, so that a pass of a model is counted and not computed.

    Meta tensors, which are public, do not go through operators for one device as training does.
    """
    return FakeTensorMode(allow_non_fake_inputs=True)


def storage_key(tensor: Tensor) -> int:
    """What tensors that share their memory have in common; those without data have no `data_ptr`."""
    return tensor.untyped_storage()._cdata


def settle_root(model: FSDPModule) -> None:
    """Tells FSDP2 which module is the root of all that it has sharded, which it learns from a first forward pass.

    A part of the model that is run before, as generation does under an adapter, would count as another root.
    """
    model._get_fsdp_state()._lazy_init()


def cpu_attention_flops(forward: Callable[..., int], backward: Callable[..., int]) -> dict[Any, Callable[..., int]]:
    """A `custom_mapping` of FlopCounterMode for attention on a CPU, which torch does not count."""
    ops = torch.ops.aten
    return {
        ops._scaled_dot_product_flash_attention_for_cpu: forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


@contextmanager
def without_hooks(modules: Sequence[nn.Module]) -> Iterator[None]:
    """The modules and their parts run without the hooks of their forward passes, of which there is no list."""
    parts: list[Any] = [part for module in modules for part in module.modules()]
    before = [(part, part._forward_pre_hooks, part._forward_hooks) for part in parts]
    for part in parts:
        part._forward_pre_hooks, part._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for part, pre, post in before:
            part._forward_pre_hooks, part._forward_hooks = pre, post


@contextmanager
def computing_with(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """In it a module finds these tensors under the names of its own parameters, which stay as they are.

    Attributes of a module that are parameters cannot be set to tensors. `functional_call` would call the module again.
    """
    own = {name: module._parameters[name] for name in values}
    parameters: dict[str, Any] = module._parameters
    parameters.update(values)
    try:
        yield
    finally:
        parameters.update(own)
