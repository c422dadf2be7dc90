"""In which type a device multiplies matrices: the one place that decides it, for models, training and measurements."""

import logging
import os

import torch

from mmkd.errors import UserError

logger = logging.getLogger(__name__)

NATIVE_BF16 = "MMKD_NATIVE_BF16"
"""The variable that overrules the check: 1 computes bf16 as asked, 0 has every CPU computed as one without it."""

_HALF = (torch.bfloat16, torch.float16)

_said: set[str] = set()


def cpu_has_native_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices by instructions of its own: AMX, AVX512-BF16 or Arm's bf16.

    Elsewhere torch falls back to loops that are two (AVX-512) to a hundred times (AVX2) as slow as fp32. Raises
    UserError where MMKD_NATIVE_BF16 is set to anything but 0 and 1.
    """
    forced = os.environ.get(NATIVE_BF16, "")
    if forced not in ("", "0", "1"):
        raise UserError(f"{NATIVE_BF16} is {forced!r}; set it to 1 or 0, or leave it unset.")
    return forced == "1" if forced else _cpu_multiplies(torch.bfloat16)


def product_dtype(wanted: torch.dtype, device: str | torch.device) -> torch.dtype:
    """The type to compute in on a device: float32 in place of a half type that its CPU only emulates."""
    if wanted not in _HALF or torch.device(device).type != "cpu":
        return wanted
    native = cpu_has_native_bf16() if wanted == torch.bfloat16 else _cpu_multiplies(torch.float16)
    return wanted if native else torch.float32


def named_dtype(name: str | torch.dtype | None, saved: str | torch.dtype | None = None) -> torch.dtype:
    """The type of a name; `auto` stands for the saved one, and nothing for float32."""
    dtype = saved if name == "auto" else name
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype or "float32")


def native_dtype(device: str | torch.device) -> torch.dtype:
    """The fastest type of products on a device: bfloat16 where it has it."""
    return product_dtype(torch.bfloat16, device)


def say_float32(what: str, wanted: torch.dtype = torch.bfloat16) -> None:
    """Warns once per process that something is computed in float32 in place of the type that was asked for."""
    name = str(wanted).removeprefix("torch.")
    # The launcher starts a process per device, and all of them would say it.
    if name in _said or os.environ.get("RANK", "0") != "0":
        return
    _said.add(name)
    insist = f" Set {NATIVE_BF16}=1 in the environment to insist on bfloat16." if wanted == torch.bfloat16 else ""
    logger.warning(
        "This CPU has no instructions for %s products and would emulate them many times slower: %s is computed in "
        "float32.%s",
        name,
        what,
        insist,
    )


def _cpu_multiplies(dtype: torch.dtype) -> bool:
    # oneDNN does the products: what it supports follows ONEDNN_MAX_CPU_ISA, but on AVX-512 it says yes to bf16 that it
    # emulates. The processor's own flags tell the two apart; torch has no public function for either.
    if not torch.backends.mkldnn.is_available():
        return False
    has = torch.cpu.get_capabilities().get
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported() and any(
            has(flag, False) for flag in ("amx_bf16", "avx512_bf16", "avx10_2", "bf16", "sve_bf16")
        )
    return torch.ops.mkldnn._is_mkldnn_fp16_supported() and any(
        has(flag, False) for flag in ("amx_fp16", "avx512_fp16", "avx10_2", "fp16_arith")
    )
