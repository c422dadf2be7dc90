"""A GPU that is none: CPU tensors which say they are on cuda:0 and, as CUDA's do, refuse to be mixed with others.

It computes what a CPU does and tells nothing of a GPU's kernels, types or speed; autocast for CUDA does nothing here.
It finds what was left on the CPU, though not a factory in a backward pass that lacks its device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers.utils import import_utils

CUDA = torch.device("cuda:0")
# Of operators that take tensors of two devices: copies from one to the other, and indices that may be the CPU's.
MIXING = {"_to_copy", "copy_", "_local_scalar_dense", "set_"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class CUDATensor(torch.Tensor):
    """Stands for `inner`, a tensor of the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "CUDATensor":
        made = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device="cpu",  # pyright: ignore[reportArgumentType]
        )
        made.inner = inner
        return made

    device = property(lambda self: CUDA)  # pyright: ignore[reportAssignmentType]
    is_cuda = property(lambda self: True)  # pyright: ignore[reportAssignmentType]
    is_cpu = property(lambda self: False)  # pyright: ignore[reportAssignmentType]

    def __format__(self, format_spec: str) -> str:
        return format(self.inner, format_spec)

    def get_device(self) -> int:
        return 0

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def cpu(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.inner.detach().clone()

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        places = [kwargs.get("device"), *args]
        places = [one.device if isinstance(one, torch.Tensor) else one for one in places]
        device = next((torch.device(one) for one in places if isinstance(one, str | torch.device)), CUDA)
        if device.type != "cpu":
            return torch.Tensor.to(self, *args, **kwargs)
        kwargs.pop("device", None)
        return self.inner.detach().to(*(one for one in args if not isinstance(one, str | torch.device)), **kwargs)

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None, device: Any = CUDA, **kwargs: Any) -> Any:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device, **kwargs)

    # As a plain tensor to functions of torch; operators come to __torch_dispatch__.
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(  # pyright: ignore
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {}, backward=False)


def _run(func: Any, args: Any, kwargs: dict[str, Any], backward: bool) -> Any:
    name = func.overloadpacket.__name__
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    ours = {id(one.inner): one for one in tensors if isinstance(one, CUDATensor)}
    _check(name, tensors, tree_leaves(args[1:2]), bool(ours))
    if name in ("pin_memory", "_pin_memory"):
        return args[0]
    here = bool(ours)
    if (place := kwargs.get("device")) is not None:
        place = torch.device(place).type
        # In the backward pass autograd makes zeros where the tensors really are.
        here = place == "cuda" or (backward and place == "cpu")
        if here:
            kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"} | {"device": "cpu"}
    args, kwargs = tree_map(_bare, args), tree_map(_bare, kwargs)
    out = _product(*args, **kwargs) if "dtype" in func._overloadname and "mm" in name else func(*args, **kwargs)

    def named(one: Any) -> Any:
        if not isinstance(one, torch.Tensor):
            return one
        # What was changed in place is the tensor that it was.
        return ours[id(one)] if id(one) in ours else CUDATensor(one)

    return tree_map(named, out) if here and name != "_local_scalar_dense" else out


def _check(name: str, tensors: list[torch.Tensor], indices: list[Any], any_here: bool) -> None:
    foreign = [one for one in tensors if not isinstance(one, CUDATensor)]
    if not any_here or not foreign or name in MIXING:
        return
    if name in INDEXING:
        foreign = [one for one in foreign if not any(one is index for index in indices)]
    # Numbers may come from anywhere, but not to be joined.
    wrong = foreign if name in ("stack", "cat") else [one for one in foreign if one.dim()]
    if wrong or (name.endswith("_") and not isinstance(tensors[0], CUDATensor)):
        shapes = [(tuple(one.shape), str(one.device)) for one in tensors]
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got {shapes}")


def _bare(value: Any) -> Any:
    return value.inner if isinstance(value, CUDATensor) else value


def _product(*args: Any, out_dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """mm and addmm that give another type than they take, which a CPU has not."""
    matrices = [one for one in args if isinstance(one, torch.Tensor)]
    dtype = next((one for one in args if isinstance(one, torch.dtype)), out_dtype)
    left, right = (one.to(dtype) for one in matrices[-2:])
    result = left @ right if len(matrices) == 2 else matrices[0] + left @ right
    return result if out is None else out.copy_(result)


class _Mode(TorchDispatchMode):
    """Operators without a tensor of ours too: those that make one."""

    in_backward = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self.in_backward > 0)


def _move(module: torch.nn.Module) -> None:
    """Moves a module there; tied weights stay tied."""
    known: dict[int, torch.nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not isinstance(parameter, CUDATensor):
                new = torch.nn.Parameter(CUDATensor(parameter.data), parameter.requires_grad)
                part._parameters[name] = known.setdefault(id(parameter), new)
        for name, buffer in part._buffers.items():
            if buffer is not None and not isinstance(buffer, CUDATensor):
                part._buffers[name] = CUDATensor(buffer)


def _moved(to: Callable[..., Any]) -> Callable[..., Any]:
    def moved(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if device is not None and device.type == "cuda":
            _move(self)
        return self if dtype is None else to(self, dtype)

    return moved


def _with_index(to: Callable[..., Any]) -> Callable[..., Any]:
    """Without an index, torch would ask CUDA for its current device."""

    def place(value: Any) -> Any:
        return CUDA if isinstance(value, str | torch.device) and torch.device(value).type == "cuda" else value

    def moved(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and isinstance(args[0], CUDATensor):
            args = (CUDA, args[0].dtype, *args[1:])
        return to(self, *map(place, args), **{name: place(value) for name, value in kwargs.items()})

    return moved


def _forget() -> None:
    """Drops what was found out about this machine's devices, and kept."""
    AcceleratorState._reset_state(reset_partial_state=True)
    for known in vars(import_utils).values():
        if hasattr(known, "cache_clear"):
            known.cache_clear()


@contextmanager
def pretended_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, what is made on cuda:0 is pretended to be there."""
    mode = _Mode()

    def maker(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(data: Any, *, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any) -> torch.Tensor:
            if isinstance(data, torch.Tensor):
                return data.to(device=data.device if device is None else device, dtype=dtype or data.dtype)
            there = device is not None and torch.device(device).type == "cuda"
            tensor = make(data, dtype=dtype, **kwargs)
            return CUDATensor(tensor) if there else tensor

        return made

    def engine(run: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            mode.in_backward += 1
            try:
                return run(*args, **kwargs)
            finally:
                mode.in_backward -= 1

        return counted

    # Kept for good by its first call, which must find what is replaced below.
    _device_constructors()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "tensor", maker(torch.tensor))
        patch.setattr(torch, "as_tensor", maker(torch.as_tensor))
        patch.setattr(torch.autograd, "grad", engine(torch.autograd.grad))
        patch.setattr(torch.Tensor, "backward", engine(torch.Tensor.backward))
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "get_rng_state", lambda device: torch.get_rng_state())
        patch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
        patch.setattr(torch.cuda, "get_device_name", lambda device=None: "pretended")
        patch.setattr(torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(total_memory=1 << 34))
        patch.setattr(torch.nn.Module, "to", _moved(torch.nn.Module.to))
        patch.setattr(torch.Tensor, "to", _with_index(torch.Tensor.to))
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "set_device", lambda device: None)
        patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        try:
            _forget()
            with mode:
                yield
        finally:
            _forget()
