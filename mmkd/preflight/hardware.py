"""What a device can do: from data sheets, or measured on this machine."""

import time
from dataclasses import dataclass, replace

import torch

from mmkd.errors import UserError
from mmkd.precision import native_dtype

from .costs import device_memory

GIB = 1 << 30
USABLE = 0.92
"""Of a device's memory; the rest is for its libraries, and lost between blocks."""

HERE = "here"
"""Names the device of this machine, whose speed is measured."""


@dataclass(frozen=True)
class Device:
    """One accelerator."""

    name: str
    memory: float
    """Bytes."""
    flops: float
    """Of dense products in `dtype` per second, as the data sheet says or as measured."""
    link: float
    """Bytes per second between devices of one machine, in one direction."""
    utilisation: float
    """Share of `flops` that a training step reaches."""
    kind: str = "cuda"
    """As torch names it."""
    dtype: str = "bf16"


# Share of a data sheet's FLOPs that well-set-up training of transformers reaches, by many reports 0.3 to 0.5.
_USUAL = 0.4

# name -> (GiB, dense bf16 TFLOPS, GB/s to its neighbours by NVLink or PCIe), from the makers' data sheets.
_SHEETS = {
    "L4": (22.5, 121, 32),
    "RTX4090": (24, 165, 32),
    "A10G": (22.5, 70, 32),
    "A100-40GB": (40, 312, 300),
    "L40S": (45, 362, 32),
    "A100-80GB": (80, 312, 300),
    "H100": (80, 989, 450),
    "H200": (141, 989, 450),
    "B200": (180, 2250, 900),
}
DEVICES = {
    name: Device(name, memory * GIB, tera * 1e12, link * 1e9, _USUAL) for name, (memory, tera, link) in _SHEETS.items()
}


def choose_device(name: str | None, memory: float | None, utilisation: float | None) -> Device:
    """The device of a name, or the one with the least memory that has `memory` GiB; the given values replace its own.

    Raises UserError for an unknown name, and for memory and utilisation that no device can have.
    """
    if memory is not None and memory <= 0:
        raise UserError(f"--memory is {memory}; give the GiB of one device.")
    if utilisation is not None and not 0 < utilisation <= 1:
        raise UserError(f"--utilisation is {utilisation}; it is a share of the device's FLOPs, at most 1.")
    if name == HERE:
        device = this_device()
    elif name is not None:
        if name not in DEVICES:
            raise UserError(f"--gpu {name!r} is not known; choose one of {', '.join([*DEVICES, HERE])}.")
        device = DEVICES[name]
    elif memory is None:
        raise UserError("Say what the run shall fit: --memory with the GiB of one device, or --gpu with its name.")
    else:
        largest = max(DEVICES.values(), key=lambda candidate: candidate.memory)
        device = next((candidate for candidate in DEVICES.values() if candidate.memory >= memory * GIB), largest)
    memory_bytes = device.memory if memory is None else memory * GIB
    return replace(device, memory=memory_bytes, utilisation=utilisation or device.utilisation)


def this_device(dtype: torch.dtype | None = None) -> Device:
    """The device that would train here, with the FLOPs that products reach on it now, by default in its fast type."""
    name, memory = device_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Wide enough for the device to reach its speed, and far from its memory.
    dtype = dtype or native_dtype(device)
    size = 8192 if device == "cuda" else 1024
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    seconds = min(_product_seconds(left, right) for _ in range(10))
    short = "bf16" if dtype == torch.bfloat16 else "fp32"
    return Device(name, memory, 2 * size**3 / seconds, 10e9, _USUAL, device, short)


def _product_seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    start = time.perf_counter()
    # Reading a value waits for a GPU.
    float((left @ right)[0, 0])
    return time.perf_counter() - start
