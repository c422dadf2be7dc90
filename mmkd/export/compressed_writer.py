"""Students in compressed-tensors, with weights rounded to the nearest codes of a grid."""

import importlib.util
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkd.errors import UserError
from mmkd.files import write_file
from mmkd.models.load import load_model
from mmkd.models.quantisation_grids import Grid
from mmkd.models.quantised_students import StudentQuantisation, joined_layers, quantised_layers, record_in_config

# The schemes of compressed-tensors whose grids are those of mmkd.
SCHEMES = {"int4": "W4A16", "int8": "W8A8", "fp8": "FP8_DYNAMIC", "nvfp4": "NVFP4", "mxfp4": "MXFP4A16"}


def check_compressed() -> None:
    """Raises UserError where the package is missing."""
    if importlib.util.find_spec("compressed_tensors") is None:
        raise UserError("This format needs compressed-tensors: pip install 'mmkd[export]'.")


def write_compressed(
    student: str, folder: Path, quantisation: StudentQuantisation, rows: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Writes a student whose weights are on a grid: those that it was trained with where it was trained so.

    `rows` are what the student reads of training data, of which NVFP4 takes the range of activations.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model: Any = load_model(student, "student", dtype="auto").eval()
    # Read again with what is written here, it would be quantised twice.
    record_in_config(model, None)
    layers = dict(quantised_layers(model, quantisation))
    grid, others = quantisation.grid, linear_layers_beside(model, layers)
    scheme = scheme_of(quantisation)
    calibrates = grid.format == "nvfp4" and scheme.input_activations is not None
    ranges = _input_ranges(model, layers, rows) if calibrates else {}
    tensor_scales = {
        name: grid.tensor_scale(*(each.weight for each in joined_layers(name, layers))) for name in layers
    }
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=others))
    for name, layer in layers.items():
        quantised = grid.quantise(layer.weight.data, tensor_scales[name])
        layer.weight_scale.data = _as_applied(grid, quantised.scales).reshape(layer.weight_scale.shape)
        if quantised.tensor_scale is not None:
            layer.weight_global_scale.data = quantised.tensor_scale.reshape(1).float()
        if calibrates:
            layer.input_global_scale.data = torch.tensor([grid.tensor_scale(torch.tensor(ranges[name]))])
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    name_left_out(folder, others)


def name_left_out(folder: Path, layers: Sequence[str]) -> None:
    """Adds layers that are not quantised to those that a written config names.

    transformers looks for the names of modules, vLLM for those of the checkpoint, which differ in vision-language
    models: with one kind alone, the other runtime expects scales of layers that have none.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    quantised = config["quantization_config"]
    quantised["ignore"] = list(dict.fromkeys([*quantised["ignore"], *layers]))
    write_file(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def scheme_of(quantisation: StudentQuantisation) -> Any:
    """How compressed-tensors describes a quantisation."""
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = preset_name_to_scheme(SCHEMES[quantisation.format], ["Linear"])
    if quantisation.format == "int4":
        assert scheme.weights is not None
        scheme.weights.group_size = quantisation.group
    if not quantisation.activations:
        scheme.input_activations = None
    return scheme


def linear_layers_beside(model: Any, layers: Collection[str]) -> list[str]:
    """The names of all linear layers of a model but these."""
    beside = set(layers)
    return [name for name, each in model.named_modules() if isinstance(each, nn.Linear) and name not in beside]


def _as_applied(grid: Grid, stored: Tensor) -> Tensor:
    """Scales as compressed-tensors divides weights by them, before it packs them."""
    if grid.format == "mxfp4":
        return torch.exp2(stored.float() - 127)
    return stored.float() if grid.format == "nvfp4" else stored


@torch.no_grad()
def _input_ranges(model: Any, layers: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The largest magnitude of what each layer reads, over rows."""
    largest = dict.fromkeys(layers, 0.0)

    def watch(name: str) -> Any:
        def hook(_: Any, inputs: Any) -> None:
            largest[name] = max(largest[name], float(inputs[0].abs().max()))

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    for row in rows:
        tensors = {name: value.to(model.device) for name, value in row.items() if isinstance(value, Tensor)}
        pixels = {name: value.to(model.dtype) for name, value in tensors.items() if value.is_floating_point()}
        model(**{**row, **tensors, **pixels, "use_cache": False})
    for hook in hooks:
        hook.remove()
    return largest
