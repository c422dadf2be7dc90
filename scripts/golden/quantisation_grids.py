"""Records how torchao and compressed-tensors quantise a weight: tests/golden/QUANTISATION_grids.npz.

Both stand in a folder of their own, since transformers would import torchao in every process:

    pip install --no-deps --target SITE torchao==0.18.0 compressed-tensors==0.20.1 loguru
    python -m scripts.golden.quantisation_grids SITE
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

TARGET = Path(__file__).parents[2] / "tests" / "golden" / "QUANTISATION_grids.npz"
PRESETS = {"int4": "W4A16", "int8": "W8A8", "fp8": "FP8_DYNAMIC", "nvfp4": "NVFP4", "mxfp4": "MXFP4"}


def by_torchao(format: str, weight: Tensor) -> Tensor:
    """The weight as torchao fake-quantises it; of nvfp4 and mxfp4, as its tensors of these types dequantise."""
    from torchao.prototype.mx_formats.config import ScaleCalculationMode  # pyright: ignore[reportMissingImports]
    from torchao.prototype.mx_formats.mx_tensor import MXTensor  # pyright: ignore[reportMissingImports]
    from torchao.prototype.mx_formats.nvfp4_tensor import (  # pyright: ignore[reportMissingImports]
        NVFP4Tensor,
        per_tensor_amax_to_scale,
    )
    from torchao.quantization import qat  # pyright: ignore[reportMissingImports]
    from torchao.quantization.qat.fake_quantizer import (  # pyright: ignore[reportMissingImports]
        Float8FakeQuantizer,
        IntxFakeQuantizer,
    )

    if format == "nvfp4":
        scale = per_tensor_amax_to_scale(weight.abs().max())
        return NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=scale).dequantize(torch.float32)
    if format == "mxfp4":
        settings = (torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.EVEN)
        return MXTensor.to_mx(weight, *settings).dequantize(torch.float32)
    if format == "fp8":
        return Float8FakeQuantizer(qat.Float8FakeQuantizeConfig())(weight)
    group: dict[str, Any] = {"group_size": 32} if format == "int4" else {"granularity": "per_channel"}
    return IntxFakeQuantizer(qat.IntxFakeQuantizeConfig(getattr(torch, format), **group))(weight)


def by_compressed_tensors(format: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weight as compressed-tensors fake-quantises it, and its scales."""
    from compressed_tensors.quantization.lifecycle.forward import (  # pyright: ignore[reportMissingImports]
        fake_quantize,
    )
    from compressed_tensors.quantization.quant_scheme import (  # pyright: ignore[reportMissingImports]
        preset_name_to_scheme,
    )
    from compressed_tensors.quantization.utils.helpers import (  # pyright: ignore[reportMissingImports]
        calculate_qparams,
        generate_gparam,
    )

    args: Any = preset_name_to_scheme(PRESETS[format], ["Linear"]).weights
    if format == "int4":
        args = args.model_copy(update={"group_size": 32})
    groups = weight.unflatten(-1, (-1, args.group_size or weight.shape[-1]))
    whole = generate_gparam(weight.amin(), weight.amax()) if format == "nvfp4" else None
    scales, zero_points = calculate_qparams(groups.amin(-1), groups.amax(-1), args, whole)
    return fake_quantize(weight, scales, zero_points, args, whole), scales


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", type=Path)
    sys.path.append(str(parser.parse_args().site))
    torch.manual_seed(0)
    weight = torch.randn(24, 64) * torch.rand(24, 1)
    # A group of nothing but zeros, and one of a single magnitude.
    weight[0, :32], weight[1, :32] = 0, 0.3
    arrays = {"weight": weight}
    for format in PRESETS:
        arrays[f"{format}_torchao"] = by_torchao(format, weight)
        arrays[f"{format}_compressed_tensors"], arrays[f"{format}_scales"] = by_compressed_tensors(format, weight)
    np.savez_compressed(TARGET, **{name: array.float().numpy() for name, array in arrays.items()})  # pyright: ignore
    print(f"Wrote {TARGET}.")


if __name__ == "__main__":
    main()
