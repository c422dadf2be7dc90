"""`mmkd env`: versions, for a bug report."""

import importlib.metadata
import os
import platform
from argparse import Namespace

from mmkd import __version__

from .command import Command

_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "flash-attn", "vllm")
_PACKAGES += ("lm-eval", "deepspeed", "huggingface_hub", "safetensors", "pyarrow")


def run(options: Namespace) -> int:
    """Prints the versions of mmkd, Python and the packages that results depend on, and the devices."""
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"mmkd {__version__}\nPython {platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores")
    print(f"devices: {', '.join(devices) or 'cpu'}")
    for package in _PACKAGES:
        print(f"{package} {_version(package)}")
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


COMMAND = Command("env", "print versions for a bug report", run)
