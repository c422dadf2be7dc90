"""Facts about the machine and the installed packages, to be stored with measurements."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mmkd import __version__

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "lm_eval", "lmms_eval", "vllm")


def machine() -> dict[str, Any]:
    """Device, processor, number of threads, and versions."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "devices": torch.cuda.device_count() if cuda else 1,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "mmkd": __version__,
        "versions": {name: installed for name in PACKAGES if (installed := _version(name)) is not None},
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
