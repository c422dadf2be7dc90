"""The values that a quantised weight can take, by format: its codes and scales, and the weight that they stand for.

The grids are those of compressed-tensors (version 0.20), which vLLM reads: a scale is the largest magnitude of a group
over half the range of the codes, and ties round to even.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from mmkd.errors import UserError

FORMATS = ("int8", "int4", "fp8", "nvfp4", "mxfp4")

_E4M3_MAX, _E2M1_MAX = 448.0, 6.0
# Magnitudes that an e2m1 code stands for; the fourth bit of a code is the sign.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_GROUPS = {"int4": 32, "nvfp4": 16, "mxfp4": 32}
_BITS = {"int8": 8, "int4": 4, "fp8": 8, "nvfp4": 4, "mxfp4": 4}


@dataclass(frozen=True)
class Quantised:
    """A quantised weight.

    Args:
        codes: int8 for int4 and int8, float8_e4m3fn for fp8, the four bits of e2m1 in uint8 for nvfp4 and mxfp4.
        scales: one per group: in the weight's own type for int4, int8 and fp8; float8_e4m3fn for nvfp4; for mxfp4 the
            biased exponent (e8m0) in uint8.
        tensor_scale: for nvfp4, by which the scales were multiplied before they were rounded; compressed-tensors
            stores it as weight_global_scale.
    """

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor | None = None


@dataclass(frozen=True)
class Grid:
    """A format, and how many weights of a row share a scale (None: the whole row)."""

    format: str
    group: int | None

    @classmethod
    def of(cls, format: str, group: int | None = None) -> Self:
        """The grid of a format. `group` is for int4, whose default is 32; the other formats have one of their own."""
        if format not in FORMATS:
            raise UserError(f"{format!r} is no format of quantised weights; choose one of {', '.join(FORMATS)}.")
        if group is not None and format != "int4" and group != _GROUPS.get(format):
            own = f"groups of {_GROUPS[format]}" if format in _GROUPS else "one scale for each row"
            raise UserError(f"A group of {group} weights is for int4; {format} has {own}.", because="meaning")
        return cls(format, group or _GROUPS.get(format))

    @property
    def bits(self) -> float:
        """Bits per weight with the scales of groups; scales of whole rows count as nothing."""
        scale = {"int4": 16, "nvfp4": 8, "mxfp4": 8}.get(self.format, 0)
        return _BITS[self.format] + (scale / self.group if self.group else 0)

    @property
    def quantises_activations(self) -> bool:
        """Whether a deployed model of this format computes with quantised activations, too."""
        return self.format in ("int8", "fp8", "nvfp4")

    def check(self, shape: tuple[int, ...] | torch.Size, name: str) -> None:
        """Raises UserError for the weight of this name and shape where its rows cannot be cut into groups."""
        if self.group and shape[-1] % self.group:
            raise UserError(
                f"{name} has {shape[-1]} weights in a row, which cannot be cut into groups of {self.group}. "
                + ("Set student_quantization_group to a divisor of it" if self.format == "int4" else "Use int8 or fp8")
                + f", or leave the layer out with student_quantization_skip: [{name.rpartition('.')[2]}].",
                because="meaning",
            )

    def tensor_scale(self, *weights: Tensor) -> Tensor | None:
        """For nvfp4 the scale of one tensor, or of several that a runtime joins to one; None for other formats."""
        if self.format != "nvfp4":
            return None
        return _tensor_scale(torch.stack([weight.detach().abs().amax().float() for weight in weights]).amax())

    @torch.no_grad()
    def quantise(self, weight: Float[Tensor, "... row"], tensor_scale: Tensor | None = None) -> Quantised:
        """The codes and scales of a weight, with a scale for its whole tensor given or its own."""
        if tensor_scale is None:
            tensor_scale = self.tensor_scale(weight)
        grouped = self._grouped(weight)
        stored, scales = self._scales(grouped, weight.dtype, tensor_scale)
        values = self._rounded(grouped / scales)
        if self.format == "fp8":
            codes = values.to(torch.float8_e4m3fn)
        else:
            codes = _e2m1_codes(values) if self.format in ("nvfp4", "mxfp4") else values.to(torch.int8)
        return Quantised(codes.reshape(weight.shape), stored.squeeze(-1), tensor_scale)

    def dequantise(self, quantised: Quantised, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that codes and scales stand for."""
        codes = quantised.codes
        values = _e2m1_values(codes) if self.format in ("nvfp4", "mxfp4") else codes.float()
        scales = self._read(quantised.scales, quantised.tensor_scale).unsqueeze(-1)
        return (self._grouped(values) * scales).reshape(codes.shape).to(dtype)

    def fake_quantised(self, weight: Float[Tensor, "... row"], tensor_scale: Tensor | None = None) -> Tensor:
        """What `dequantise(quantise(weight))` gives, in the weight's type. The gradient goes straight through."""
        if tensor_scale is None:
            tensor_scale = self.tensor_scale(weight)
        return _StraightThrough.apply(weight, self, weight.dtype, tensor_scale)

    def fake_quantised_tokens(self, hidden: Float[Tensor, "... hidden"]) -> Tensor:
        """Activations as a runtime quantises them when it computes: every token by itself, with scales in float32.

        The gradient goes to the activations as it is. Of nvfp4, runtimes take the scale of the tensor from a
        calibration; here each token has its own, so that a token's values do not depend on its batch.
        """
        tensor_scale = None
        if self.format == "nvfp4":
            tensor_scale = _tensor_scale(hidden.detach().abs().amax(-1, keepdim=True).float()).unsqueeze(-1)
        return _StraightThrough.apply(hidden, self, torch.float32, tensor_scale)

    # The parts of a grid

    def _grouped(self, weight: Tensor) -> Tensor:
        """[..., group, weight of a group], in float32."""
        return weight.float().unflatten(-1, (-1, self.group or weight.shape[-1]))

    def _scales(self, grouped: Tensor, dtype: torch.dtype, tensor_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """The scales of groups as they are stored, and as weights are divided by them."""
        least, most = grouped.aminmax(dim=-1, keepdim=True)
        largest = torch.maximum(-least, most)
        if self.format == "mxfp4":
            stored = _e8m0(largest)
        elif self.format == "nvfp4":
            assert tensor_scale is not None
            stored = (largest / _E2M1_MAX * tensor_scale).clamp(max=_E4M3_MAX)
            stored = _no_zeros(stored.to(torch.float8_e4m3fn).float(), 0.125).to(torch.float8_e4m3fn)
        else:
            half = {"int8": 127.5, "int4": 7.5, "fp8": _E4M3_MAX}[self.format]
            stored = _no_zeros((largest / half).to(dtype), torch.finfo(dtype).eps)
        return stored, self._read(stored, tensor_scale)

    def _read(self, stored: Tensor, tensor_scale: Tensor | None) -> Tensor:
        if self.format == "mxfp4":
            return torch.exp2(stored.float() - 127)
        if tensor_scale is not None:
            return stored.float() / tensor_scale
        return stored.float()

    def _rounded(self, values: Tensor) -> Tensor:
        """Scaled weights as the nearest codes, in float32; in their place, since this runs for every forward pass."""
        if self.format == "fp8":
            return values.clamp_(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).float()
        if self.format in ("nvfp4", "mxfp4"):
            return _to_e2m1(values)
        half = 2 ** (_BITS[self.format] - 1)
        return values.round_().clamp_(-half, half - 1)


class _StraightThrough(torch.autograd.Function):
    """A tensor on its grid, whose gradient is that of the tensor itself."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, grid: Grid, dtype: torch.dtype, tensor_scale: Tensor | None) -> Tensor:
        grouped = grid._grouped(tensor)
        _, scales = grid._scales(grouped, dtype, tensor_scale)
        return grid._rounded(grouped / scales).mul_(scales).reshape(tensor.shape).to(tensor.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None, None, None


def _tensor_scale(largest: Tensor) -> Tensor:
    """By what scales are multiplied so that the largest of them is the largest e4m3."""
    scale = _E4M3_MAX * _E2M1_MAX / largest.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.nan_to_num(scale, nan=1.0, posinf=1.0)


def _no_zeros(scales: Tensor, least: float) -> Tensor:
    return torch.where(scales == 0, torch.full_like(scales, least), scales)


def _e8m0(largest: Tensor) -> Tensor:
    """Biased exponents by which the largest magnitudes fit e2m1; they are rounded up from 1.75 times a power of 2."""
    # Adding a quarter of the mantissa's range carries into the exponent from there on.
    exponent = (largest.view(torch.int32) + (1 << 21)) >> 23
    return (exponent - 2).clamp(0, 254).to(torch.uint8)


def _to_e2m1(values: Tensor) -> Tensor:
    # The spacing doubles at 2 and at 4, and rounding a multiple of it half to even rounds the mantissa so.
    magnitude = values.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return values.div_(step).round_().mul_(step).clamp_(-_E2M1_MAX, _E2M1_MAX)


def _e2m1_codes(values: Tensor) -> Tensor:
    magnitude = values.abs()
    index = torch.where(magnitude <= 2, magnitude * 2, torch.where(magnitude <= 4, magnitude + 2, 7.0))
    return index.to(torch.uint8) + 8 * torch.signbit(values).to(torch.uint8)


def _e2m1_values(codes: Tensor) -> Tensor:
    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=codes.device)
    return values[codes.long()]
