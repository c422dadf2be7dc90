"""Students as ONNX: one graph from tokens, positions and a cache to logits and the longer cache."""

import importlib.util
from pathlib import Path
from typing import Any

import torch

from mmkd.errors import UserError
from mmkd.models.load import load_model

MAIN = "model.onnx"
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_BLOCK = 32
"""Weights that share a scale in int4."""


def check_onnx(config: Any) -> None:
    """Raises UserError where packages are missing, and for what is no language model of text."""
    absent = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        raise UserError(f"Format onnx needs {', '.join(absent)}: pip install 'mmkd[export]'.")
    if hasattr(config, "vision_config"):
        raise UserError(
            "A vision-language model is not exported to ONNX here: its language model would be, without the tower. "
            "Use compressed-tensors, or gguf where llama.cpp knows the model.",
            because="not built",
        )


def write_onnx(student: str, folder: Path, quantization: str) -> None:
    """Writes the graph of a student to a folder.

    transformers' own exporter makes it. int8 quantises weights, and activations as they come; int4 weights alone.
    """
    from transformers.exporters.base import ExportedModel
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter
    from transformers.exporters.utils import decompose_for_generation

    # The graph is the same for every type; float32 is what ONNX Runtime has all its kernels for on a CPU.
    model: Any = load_model(student, "student", dtype="float32").eval()
    tokens = torch.arange(12).reshape(2, 6) % model.config.get_text_config().vocab_size
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    # The step that goes on with any number of tokens reads a whole prompt too, beside an empty cache.
    step: Any
    step, given = decompose_for_generation(model, inputs, multi_token_decode=True)["decode"]
    exported = OnnxExporter().export(step, given, OnnxConfig(dynamic=True))
    ExportedModel(exported.components, exported.export_format, model.config, model.generation_config).save_pretrained(
        folder
    )
    if quantization != "fp32":
        _quantise(folder / MAIN, quantization)


def _quantise(path: Path, quantization: str) -> None:
    """Replaces a graph by one with quantised products of matrices, but for that with the head."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    graph = onnx.load(path)
    head = [node.name for node in graph.graph.node if "logits" in node.output]
    data, small = path.with_name(f"{path.name}.data"), path.with_name("quantised.onnx")
    if quantization == "int4":
        quantizer: Any = MatMulNBitsQuantizer(graph, block_size=_BLOCK, is_symmetric=True, nodes_to_exclude=head)
        quantizer.process()
        graph = quantizer.model.model
    else:
        # Shapes that were inferred before stand in the way of what it infers after its changes.
        names = {weight.name for weight in graph.graph.initializer}
        kept = [info for info in graph.graph.value_info if info.name not in names]
        del graph.graph.value_info[:]
        graph.graph.value_info.extend(kept)
        quantize_dynamic(
            graph, small, weight_type=QuantType.QInt8, per_channel=True, nodes_to_exclude=head,
            use_external_data_format=True,
        )  # fmt: skip
        graph = onnx.load(small)
    for left in (small, small.with_name(f"{small.name}.data"), path, data):
        left.unlink(missing_ok=True)
    onnx.save(graph, str(path), save_as_external_data=True, location=data.name)
