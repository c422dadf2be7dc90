"""A GPU that is none: CPU tensors which say they are on cuda:0 and, as CUDA's do, refuse to be mixed with others.

It computes what a CPU does, and tells nothing of a GPU's kernels, types or speed. It finds what was left on the CPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from mmkd.teachers.local import LocalTeacher
from mmkd.teachers.several import parts_of
from mmkd.trainers.base import DistillationTrainer

CUDA = torch.device("cuda:0")
# Of operators that take tensors of two devices: copies from one to the other, and indices that may be the CPU's.
MIXING = {"_to_copy", "copy_", "_local_scalar_dense", "set_"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_INDEX_TYPES = {torch.int64, torch.int32, torch.bool, torch.uint8}


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

    def cpu(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.inner.detach()

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
    _check(name, tensors, bool(ours))
    here = bool(ours)
    if (place := kwargs.get("device")) is not None:
        # In the backward pass autograd makes zeros where the tensors really are.
        here = backward or torch.device(place).type == "cuda"
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"} | {"device": "cpu"}
    args, kwargs = tree_map(_bare, args), tree_map(_bare, kwargs)
    out = _product(*args, **kwargs) if "dtype" in func._overloadname and "mm" in name else func(*args, **kwargs)

    def named(one: Any) -> Any:
        if not isinstance(one, torch.Tensor):
            return one
        # What was changed in place is the tensor that it was.
        return ours[id(one)] if id(one) in ours else CUDATensor(one)

    return tree_map(named, out) if here and name != "_local_scalar_dense" else out


def _check(name: str, tensors: list[torch.Tensor], any_here: bool) -> None:
    foreign = [one for one in tensors if not isinstance(one, CUDATensor)]
    if not any_here or not foreign or name in MIXING:
        return
    if name in INDEXING:
        foreign = [one for one in foreign if one.dtype not in _INDEX_TYPES]
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
            if parameter is not None:
                new = torch.nn.Parameter(CUDATensor(parameter.data), parameter.requires_grad)
                part._parameters[name] = known.setdefault(id(parameter), new)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = CUDATensor(buffer)


@contextmanager
def on_cuda(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, a trainer is there with its models."""
    teachers = parts_of(trainer.teacher) if isinstance(trainer, DistillationTrainer) else []
    for model in [trainer.model, *(one.model for one in teachers if isinstance(one, LocalTeacher))]:
        _move(model)
    for name, value in vars(trainer).items():
        if isinstance(value, torch.Tensor):
            setattr(trainer, name, CUDATensor(value))
    with monkeypatch.context() as patch, _pretended(patch):
        patch.setattr(trainer.accelerator.state, "device", CUDA, raising=False)
        patch.setitem(vars(trainer.args), "_setup_devices", CUDA)
        yield


def steps_on_cuda(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer step of two micro-batches there without its update, an evaluation, and the logs of both."""
    rows = [dict(trainer.train_dataset[row]) for row in range(8)]
    collated = [trainer.data_collator(rows[:4]), trainer.data_collator(rows[4:])]
    with on_cuda(trainer, monkeypatch):
        trainer.state.logging_steps, trainer.state.max_steps = trainer.args.logging_steps, 4
        trainer.model.train()
        batches = iter([send_to_device(batch, CUDA) for batch in collated])
        accumulated, _ = trainer.get_batch_samples(batches, 2, CUDA)
        for batch in accumulated:
            loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
            assert isinstance(loss, CUDATensor)
            assert loss.isfinite()
            loss.backward()
        gradients = [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]
        assert gradients
        assert all(isinstance(gradient, CUDATensor) for gradient in gradients)
        trainer._spent = (1.0, 1)
        trainer.log({"loss": 0.0})
        trainer.model.eval()
        with torch.no_grad():
            trainer.compute_loss(trainer.model, send_to_device(collated[0], CUDA))
        trainer.log({})


@contextmanager
def _pretended(patch: pytest.MonkeyPatch) -> Iterator[None]:
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

    patch.setattr(torch, "tensor", maker(torch.tensor))
    patch.setattr(torch, "as_tensor", maker(torch.as_tensor))
    patch.setattr(torch.autograd, "grad", engine(torch.autograd.grad))
    patch.setattr(torch.Tensor, "backward", engine(torch.Tensor.backward))
    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    patch.setattr(torch.cuda, "get_rng_state", lambda device: torch.get_rng_state())
    patch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    patch.setitem(PartialState._shared_state, "device", CUDA)
    with mode:
        yield
