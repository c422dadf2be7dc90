"""Who writes a student in which format, checked before anything is written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from mmkd.errors import UserError
from mmkd.export.compressed_writer import check_compressed, linear_layers_beside, name_left_out, write_compressed
from mmkd.export.formats import ExportSpec
from mmkd.export.gguf_writer import LlamaCpp
from mmkd.export.llm_compressor import LLMCompressor
from mmkd.export.onnx_writer import MAIN, check_onnx, write_onnx
from mmkd.export.runtimes import has_images
from mmkd.models.quantised_students import StudentQuantisation, quantised_experts, quantised_layers

from .student_to_export import StudentToExport

_BITS = {"int4": 4, "int8": 8}


@dataclass(frozen=True)
class Written:
    """What a writer did."""

    made_by: str
    main: str | None = None
    """The file that a runtime is given; None where that is the folder."""
    notes: Sequence[str] = ()


Writer = Callable[[str, Path], Written]
"""Writes a student, the path of its folder first, to a folder."""


def writer_of(spec: ExportSpec, student: StudentToExport) -> Writer:
    """What writes a format. Raises UserError where a package is missing, or the format is not for this student."""
    if hasattr(student.config, "quantization_config"):
        raise UserError(
            f"{student.eval_model.name} has quantised weights already, which no converter takes. Export the student "
            "before it was quantised.",
            because="meaning",
        )
    if spec.format == "gguf":
        return _gguf(spec, student)
    if spec.format == "onnx":
        check_onnx(student.config)
        return partial(_write_onnx, spec)
    if spec.format in ("awq", "gptq"):
        return _llm_compressor(spec, student)
    return _compressed(spec, student)


def layers_of(student: StudentToExport, quantisation: StudentQuantisation) -> list[str]:
    """The names of the layers that are quantised. Raises UserError where none can be, or not all."""
    try:
        layers = [name for name, _ in quantised_layers(student.empty_model, quantisation)]
        experts = quantised_experts(student.empty_model, quantisation)
    except UserError as error:
        raise UserError(f"{error} As flags here, these keys are --skip and --group.") from error
    if experts:
        raise UserError(
            f"The experts of {student.eval_model.name} are one tensor ({next(iter(experts))}), which is not packed as "
            "compressed-tensors here. Leave them as they are with --skip experts router, or use gguf.",
            because="not built",
        )
    return layers


def _gguf(spec: ExportSpec, student: StudentToExport) -> Writer:
    tools = LlamaCpp.find(student.options.llama_cpp)
    tools.check(student.folder, spec.quantization)

    def write(place: str, folder: Path) -> Written:
        main, notes = tools.write(place, folder, spec.quantization)
        return Written(f"llama.cpp, {tools.script.name}", main, notes)

    return write


def _write_onnx(spec: ExportSpec, place: str, folder: Path) -> Written:
    write_onnx(place, folder, spec.quantization)
    return Written(f"transformers {version('transformers')}, onnxscript {version('onnxscript')}", MAIN)


def _compressed(spec: ExportSpec, student: StudentToExport) -> Writer:
    check_compressed()
    quantisation = student.quantisation(spec.quantization)
    layers_of(student, quantisation)
    rows = [view.inputs for view in student.calibration] if spec.facts.calibrates else []

    def write(place: str, folder: Path) -> Written:
        write_compressed(place, folder, quantisation, rows)
        return Written(f"compressed-tensors {version('compressed-tensors')}")

    return write


def _llm_compressor(spec: ExportSpec, student: StudentToExport) -> Writer:
    check_compressed()
    tool, quantisation = LLMCompressor.find(student.options.llm_compressor), student.quantisation(spec.quantization)
    layers = layers_of(student, quantisation)
    if any(map(has_images, student.calibration)):
        raise UserError(
            f"Format {spec.format} is calibrated by llm-compressor on rows of text, and those of {student.data} have "
            "images: name others with --data. nvfp4 and compressed-tensors take these.",
            because="not built",
        )
    rows = student.calibration_ids
    others = linear_layers_beside(student.empty_model, layers)

    def write(place: str, folder: Path) -> Written:
        bits = _BITS[spec.quantization]
        tool.write(place, folder, spec.format, bits, quantisation.grid.group, others, rows)
        name_left_out(folder, others)
        return Written(f"llm-compressor {tool.version}")

    return write
