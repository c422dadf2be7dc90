"""Students as GGUF, by llama.cpp's own converter and quantiser."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.cache.identity import saved_dtype
from mmkd.errors import UserError, last_line

SCRIPT, TOOL, VARIABLE = "convert_hf_to_gguf.py", "llama-quantize", "LLAMA_CPP"

TOWER = "mmproj.gguf"
"""The tower of a vision-language model, beside its language model."""

_BY_CONVERTER = {"f32", "f16", "bf16", "q8_0"}
"""Types that the converter writes itself."""

_WHOLE = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}

_QUANTISE = """
import sys, llama_cpp
whole, target, quantization, threads = sys.argv[1:]
settings = llama_cpp.llama_model_quantize_default_params()
settings.nthread = int(threads)
settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quantization.upper()}")
sys.exit(llama_cpp.llama_model_quantize(whole.encode(), target.encode(), settings))
"""
"""The quantiser as a program of the Python package: it writes a line for each tensor."""

_GET = (
    "Get it with `git clone https://github.com/ggml-org/llama.cpp`, and name the folder with --llama_cpp or in the "
    f"variable {VARIABLE}."
)


@dataclass(frozen=True)
class LlamaCpp:
    """The tools of llama.cpp on this machine."""

    script: Path
    tool: Path | None
    """Its quantiser as a program; the Python package llama_cpp has it as a function."""

    @classmethod
    def find(cls, folder: str | None) -> "LlamaCpp":
        """Those of a folder, of that in the environment, or of the search path. Raises UserError without any."""
        named = folder or os.environ.get(VARIABLE)
        places = [Path(named)] if named else []
        on_path = [Path(path) for path in (shutil.which(SCRIPT),) if path]
        scripts = [place / SCRIPT for place in places if (place / SCRIPT).is_file()] or on_path
        if not scripts:
            where = f"{named} has no {SCRIPT}" if named else f"there is no {SCRIPT} here"
            raise UserError(f"Format gguf needs llama.cpp's converter, and {where}. {_GET}")
        built = [place / "build/bin" / TOOL for place in places] + [
            Path(path) for path in (shutil.which(TOOL),) if path
        ]
        return cls(scripts[0], next((path for path in built if path.is_file()), None))

    def check(self, student: str, quantization: str) -> None:
        """Raises UserError for an architecture or a tokenizer that llama.cpp does not know, in half a minute."""
        if quantization not in _BY_CONVERTER and self.tool is None and importlib.util.find_spec("llama_cpp") is None:
            raise UserError(
                f"Quantising to {quantization} needs llama.cpp's quantiser: pip install llama-cpp-python, or build "
                f"{TOOL} in the folder of llama.cpp. Without it there are {', '.join(sorted(_BY_CONVERTER))}."
            )
        with tempfile.TemporaryDirectory() as scratch:
            self._convert(student, Path(scratch, "vocabulary.gguf"), "--vocab-only")

    def write(self, student: str, folder: Path, quantization: str) -> tuple[str, list[str]]:
        """Writes a GGUF file, and for a vision-language model that of its tower beside it.

        Returns the name of the file and what a user should know of it.
        """
        main = f"model-{quantization}.gguf"
        direct = quantization if quantization in _BY_CONVERTER else _WHOLE.get(saved_dtype(student), "bf16")
        whole = folder / (main if direct == quantization else f"whole-{direct}.gguf")
        self._convert(student, whole, "--outtype", direct)
        if direct != quantization:
            self._quantise(whole, folder / main, quantization)
            whole.unlink()
        if has_tower(student):
            self._convert(student, folder / TOWER, "--mmproj", "--outtype", "f16")
        return main, _notes(folder / main, quantization)

    def _convert(self, student: str, target: Path, *flags: str) -> None:
        command = [sys.executable, str(self.script), student, "--outfile", str(target), *flags]
        # Code and words of the converter are its own: it runs by itself, and offline.
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        if done.returncode == 0:
            return
        last = last_line(done.stderr) or f"exit status {done.returncode}"
        if last.startswith("ModuleNotFoundError"):
            package = last.rpartition(" ")[2].strip("'")
            raise UserError(
                f"llama.cpp's converter needs the package {package}: pip install 'mmkd[export]' {package}."
            )
        raise UserError(
            f"llama.cpp's converter does not take {student}: {last} A newer llama.cpp may know the model; the other "
            "formats do not need it.",
            because="upstream",
        )

    def _quantise(self, whole: Path, target: Path, quantization: str) -> None:
        threads = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count())
        words = [str(whole), str(target), quantization, threads]
        command = [str(self.tool)] if self.tool is not None else [sys.executable, "-c", _QUANTISE]
        done = subprocess.run([*command, *words], capture_output=True, text=True)
        if done.returncode:
            reason = last_line(done.stderr) or f"exit status {done.returncode}."
            raise UserError(f"llama.cpp could not quantise to {quantization}: {reason} Try another quantisation.")


def has_tower(student: str) -> bool:
    """Whether a student is a vision-language model."""
    from transformers import AutoConfig

    return hasattr(AutoConfig.from_pretrained(student), "vision_config")


def types_of(path: Path) -> dict[str, int]:
    """How many tensors of a GGUF file have which type."""
    import gguf

    reader: Any = gguf.GGUFReader(path)
    return dict(Counter(tensor.tensor_type.name.lower() for tensor in reader.tensors))


def _notes(path: Path, quantization: str) -> list[str]:
    """Says where llama.cpp had to take other types than those of the quantisation."""
    if "_k" not in quantization:
        return []
    kinds = types_of(path)
    # Its K-quants are blocks of 256 weights; rows that are no multiple of it get the types of blocks of 32.
    others = sum(count for kind, count in kinds.items() if kind in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl"))
    total = sum(count for kind, count in kinds.items() if kind != "f32")
    if not others:
        return []
    return [
        f"{others} of {total} quantised tensors have rows that are no multiple of 256, which {quantization} needs: "
        "llama.cpp gave them the next larger type, so that the file is larger than usual."
    ]
