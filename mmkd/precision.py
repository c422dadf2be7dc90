"""The type in which a device multiplies matrices: decided here alone, for models, training and measurements."""

import logging
import os

import torch

from mmkd.errors import UserError
from mmkd.seams.torch_seam import cpu_has_products_of

logger = logging.getLogger(__name__)

NATIVE_BF16 = "MMKD_NATIVE_BF16"
"""The variable that overrides detection: 1 computes half types as requested, 0 as on a CPU that emulates bf16."""

_FLAGS = {
    torch.bfloat16: ("amx_bf16", "avx512_bf16", "avx10_2", "bf16", "sve_bf16"),
    torch.float16: ("amx_fp16", "avx512_fp16", "avx10_2", "fp16_arith"),
}

_warned: list[str] = []


def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of a half type: AMX, AVX-512 BF16 or FP16, Arm's.

    Elsewhere torch emulates them, two (AVX-512) to a hundred times (AVX2) slower than float32. Raises UserError where
    MMKD_NATIVE_BF16 is set to anything but 0 and 1.
    """
    forced = os.environ.get(NATIVE_BF16, "")
    if forced not in ("", "0", "1"):
        raise UserError(f"{NATIVE_BF16} is {forced!r}; set it to 1 or 0, or leave it unset.")
    if forced == "1" or (forced == "0" and dtype == torch.bfloat16):
        return forced == "1"
    # oneDNN computes the products; without it torch has no fast kernels. Its answer respects ONEDNN_MAX_CPU_ISA, but
    # on plain AVX-512 it is yes although bf16 is emulated, so that the processor's flags are checked too.
    if not torch.backends.mkldnn.is_available():
        return False
    flags = torch.cpu.get_capabilities()
    return cpu_has_products_of(dtype) and any(flags.get(flag, False) for flag in _FLAGS[dtype])


def product_dtype(dtype: torch.dtype, device: str | torch.device) -> torch.dtype:
    """The type to compute in on a device: float32 in place of a half type that its CPU only emulates."""
    emulated = torch.device(device).type == "cpu" and dtype in _FLAGS and not cpu_multiplies(dtype)
    return torch.float32 if emulated else dtype


def native_dtype(device: str | torch.device) -> torch.dtype:
    """The fastest type of products on a device: bfloat16, or float32 where its CPU only emulates that."""
    return product_dtype(torch.bfloat16, device)


def name_of_dtype(dtype: str | torch.dtype) -> str:
    """The name of a type in recipes, such as float32."""
    return str(dtype).removeprefix("torch.")


def say_emulated(role: str, dtype: torch.dtype, device: str | torch.device) -> None:
    """Logs a warning about a model that the user has loaded in a type that the device's CPU emulates."""
    if product_dtype(dtype, device) != dtype:
        logger.warning(
            "The %s is in %s, which this CPU emulates many times slower than float32. Load it with dtype float32.",
            role,
            name_of_dtype(dtype),
        )


def say_float32() -> None:
    """Logs a warning, once per process and only on the first rank, that half types are computed in float32."""
    if _warned or os.environ.get("RANK", "0") != "0":
        return
    _warned.append(NATIVE_BF16)
    logger.warning(
        "This CPU has no instructions for products in half precision and would emulate them many times slower. What "
        "bf16, dtype, teacher_dtype or saved weights ask to compute in bfloat16 or float16 is computed in float32. "
        "To insist on half precision, set %s=1 in the environment.",
        NATIVE_BF16,
    )
