"""`mmkd export`: a student in the formats of llama.cpp, vLLM and ONNX Runtime."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from mmkd.export.formats import FORMATS

from .command import Command, add_trust


def add_flags(parser: ArgumentParser) -> None:
    """What to export, how it is quantised, and what it is checked on."""
    add = parser.add_argument
    add("model", metavar="RUN_OR_MODEL", help="a run's folder, the folder of a model, or a Hub id")
    add(
        "--format",
        nargs="+",
        required=True,
        metavar="FORMAT[:QUANTIZATION]",
        help=f"one or several of {', '.join(FORMATS)}",
    )
    add(
        "--quantization",
        nargs="+",
        default=[],
        help="of formats that name none; "
        + "; ".join(f"{each.name}: {', '.join(each.quantizations)}" for each in FORMATS.values())
        + " (default: that of the student's training, else the first)",
    )
    add("--output", type=Path, help="folder of the only format (default: exported/FORMAT-QUANTIZATION in the run's)")
    add("--data", help="data to calibrate and to check on (default: that of the run)")
    add("--rows", type=int, default=32, help="held-out rows of the check; 0 compares nothing (default: 32)")
    add("--calibration_rows", type=int, default=128, help="training rows for awq, gptq and nvfp4 (default: 128)")
    add("--max_length", type=int, default=512, help="longest row in tokens (default: 512)")
    add("--group", type=int, help="weights that share a scale in int4 (default: that of the training, else 32)")
    add(
        "--skip",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="layers that are not quantised, as in student_quantization_skip: down_proj, layers.0, *.mlp.*",
    )
    add("--llama_cpp", metavar="FOLDER", help="llama.cpp's repository, for gguf (default: LLAMA_CPP, or the PATH)")
    add("--llm_compressor", metavar="PYTHON", help="the Python that has llm-compressor, for awq and gptq")
    add(
        "--vllm",
        metavar="PYTHON",
        help="the Python that has vLLM, which reads what is written for it; none leaves it out (default: VLLM_PYTHON, "
        "or that of scripts/serve_teacher.sh)",
    )
    add("--device", default="cpu", help="where the student and transformers compute: cpu, cuda (default: cpu)")
    add_trust(parser)


def run(options: Namespace) -> int:
    """Exports, and prints a line for the student and one for each format."""
    from mmkd.export.formats import specs_of
    from mmkd.publish.export_student import export, measured_student
    from mmkd.publish.export_table import show_exported
    from mmkd.publish.student_to_export import ExportOptions, trained_quantization

    quantizations = options.quantization or trained_quantization(options.model, options.format)
    specs = specs_of(options.format, quantizations)
    chosen = ExportOptions(
        output=options.output,
        data=options.data,
        rows=options.rows,
        calibration_rows=options.calibration_rows,
        max_length=options.max_length,
        group=options.group,
        skip=options.skip,
        llama_cpp=options.llama_cpp,
        llm_compressor=options.llm_compressor,
        vllm=options.vllm,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
    )

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    exported = export(options.model, specs, chosen, say)
    show_exported(measured_student(options.model, chosen), exported)
    for each in exported:
        print(each.path)
    return 0


COMMAND = Command(
    "export",
    "a student in the formats of llama.cpp, vLLM and ONNX Runtime",
    run,
    add_flags,
    "Writes the student of a run as GGUF, compressed-tensors (AWQ, GPTQ and NVFP4 too) or ONNX, loads each file with "
    "a runtime that reads it, and compares its log-probs with the student's on held-out rows. What is finished is "
    "kept: the same command goes on.",
)
