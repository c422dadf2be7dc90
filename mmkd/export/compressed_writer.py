"""Students in compressed-tensors, with weights rounded to the nearest codes of a grid."""

import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkd.errors import UserError
from mmkd.models.load import load_model
from mmkd.models.quantisation_grids import Grid

# The schemes of compressed-tensors whose grids are those of mmkd.
SCHEMES = {"int4": "W4A16", "int8": "W8A8", "fp8": "FP8_DYNAMIC", "nvfp4": "NVFP4", "mxfp4": "MXFP4A16"}

# The largest magnitude that an activation of NVFP4 can have is that of e4m3 scales by that of e2m1 codes.
_NVFP4_LARGEST = 448.0 * 6.0

_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that runtimes join to one, which must have one scale of the tensor."""


def check_compressed() -> None:
    """Raises UserError where the package is missing."""
    if importlib.util.find_spec("compressed_tensors") is None:
        raise UserError("This format needs compressed-tensors: pip install 'mmkd[export]'.")


def write_compressed(
    student: str, folder: Path, grid: Grid, skip: Sequence[str] = (), rows: Sequence[Sequence[int]] = ()
) -> list[str]:
    """Writes a student whose weights are on a grid; returns what a user should know of it.

    `skip` are patterns of layers that stay as they are, beside head and vision tower. `rows` are token ids of training
    data, of which NVFP4 takes the range of activations. Raises UserError where a layer cannot be cut into groups.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model: Any = load_model(student, "student", dtype="auto").eval()
    layers = quantised_layers(model, skip)
    for name, layer in layers.items():
        grid.check(layer.weight.shape, name)
    others = [name for name in linear_layers(model) if name not in layers]
    ranges = _input_ranges(model, layers, rows) if grid.format == "nvfp4" else {}
    groups = {"group_0": scheme_of(grid)}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=others))
    tensor_scales = _tensor_scales(grid, layers)
    for name, layer in layers.items():
        quantised = grid.quantise(layer.weight.data, tensor_scales.get(name))
        layer.weight_scale.data = _as_applied(grid, quantised.scales).reshape(layer.weight_scale.shape)
        if quantised.tensor_scale is not None:
            layer.weight_global_scale.data = quantised.tensor_scale.reshape(1).float()
            layer.input_global_scale.data = torch.tensor([_NVFP4_LARGEST / max(ranges[name], 1e-9)])
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    return _experts_left(model)


def scheme_of(grid: Grid) -> Any:
    """How compressed-tensors describes a grid."""
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = preset_name_to_scheme(SCHEMES[grid.format], ["Linear"])
    if grid.format == "int4":
        assert scheme.weights is not None
        scheme.weights.group_size = grid.group
    return scheme


def linear_layers(model: Any) -> list[str]:
    """The names of all linear layers of a model."""
    return [name for name, each in model.named_modules() if isinstance(each, nn.Linear)]


def quantised_layers(model: Any, skip: Sequence[str] = ()) -> dict[str, Any]:
    """The linear layers of a model's language part by name, but for its head and for those that a pattern names."""
    head = model.get_output_embeddings()
    text = model.get_decoder() if hasattr(model.config, "vision_config") else model
    inside = {id(each) for each in text.modules()}
    return {
        name: each
        for name, each in model.named_modules()
        if isinstance(each, nn.Linear)
        and each is not head
        and id(each) in inside
        and not any(re.search(pattern, name) for pattern in skip)
    }


def _as_applied(grid: Grid, stored: Tensor) -> Tensor:
    """Scales as compressed-tensors divides weights by them, before it packs them."""
    if grid.format == "mxfp4":
        return torch.exp2(stored.float() - 127)
    return stored.float() if grid.format == "nvfp4" else stored


def _tensor_scales(grid: Grid, layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of NVFP4, the scale of each layer's tensor: one for all layers that a runtime joins."""
    if grid.format != "nvfp4":
        return {}
    scales = {}
    for name in layers:
        parent, _, own = name.rpartition(".")
        names = next((names for names in _JOINED if own in names), (own,))
        together = [f"{parent}.{each}" for each in names if f"{parent}.{each}" in layers]
        scale = grid.tensor_scale(*(layers[each].weight for each in together))
        assert scale is not None
        scales[name] = scale
    return scales


@torch.no_grad()
def _input_ranges(model: Any, layers: Mapping[str, Any], rows: Sequence[Sequence[int]]) -> dict[str, float]:
    """The largest magnitude of what each layer reads, over rows."""
    largest = dict.fromkeys(layers, 0.0)

    def watch(name: str) -> Any:
        def hook(_: Any, inputs: Any) -> None:
            largest[name] = max(largest[name], float(inputs[0].abs().max()))

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    for ids in rows:
        model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return largest


def _experts_left(model: Any) -> list[str]:
    """Says where experts stay as they are: transformers keeps them in tensors of their own, not in linear layers."""
    left = sum(weight.numel() for name, weight in model.named_parameters() if "experts" in name and weight.ndim == 3)
    share = left / max(1, sum(weight.numel() for weight in model.parameters()))
    note = f"The experts, {share:.0%} of the weights, are not quantised: this format is written of linear layers."
    return [note] if left else []
