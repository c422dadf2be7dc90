"""Exports through the converters and runtimes of others, end to end; each skips where its tool is not installed."""

import os
import shutil
from pathlib import Path

import pytest

from mmkd.commands.main import main
from mmkd.export.exported import Exported, exported_of
from mmkd.export.loading import runtime_of
from mmkd.generation.generator import Sampling
from scripts.make_tiny_models import make_model
from tests.export.test_export import export, student  # noqa: F401

SMOLLM2 = Path(__file__).parents[2] / ".cache/mmkd/SmolLM2-135M-Instruct"

pytestmark = pytest.mark.slow


def continues_alike(exported: Exported) -> bool:
    """Whether tokens with a cache are those that the whole sequence, read at once, finds likeliest."""
    runtime, ids = runtime_of(exported), list(range(5, 20))
    said = list(runtime.tokens(ids, Sampling(4), ()))
    return runtime.scored([*ids, *said]).top[len(ids) - 1 :].tolist() == said


def test_onnx_computes_what_the_student_does(student):  # noqa: F811
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    for each in export(student, "--format", "onnx", "--quantization", "fp32", "int8", "int4"):
        limit = {"fp32": 1e-8, "int8": 0.01, "int4": 0.3}[each.spec.quantization]
        assert each.check["kl"] < limit, each.name
        assert continues_alike(each), each.name
    sizes = {each.spec.quantization: each.record["bytes"] for each in exported_of(student)}
    assert max(sizes["int4"], sizes["int8"]) < sizes["fp32"]


def test_gguf_computes_what_the_student_does(student, capsys):  # noqa: F811
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is compiled when it is installed")
    if "LLAMA_CPP" not in os.environ:
        pytest.skip("LLAMA_CPP does not name a folder with llama.cpp's converter")
    # Nobody has seen its tokenizer before.
    export(student, "--format", "gguf:f32", status=2)
    assert "llama.cpp's converter does not take" in capsys.readouterr().err
    if not SMOLLM2.is_dir():
        pytest.skip("SmolLM2's tokenizer is not here: mmkd prepare")
    known = Path("known")
    make_model(width=64, rows=49152).save_pretrained(known)
    for path in SMOLLM2.glob("*token*"):
        shutil.copy(path, known)
    asked = ["--data", "words.yaml", "--rows", "4"]
    assert main(["export", str(known), "--format", "gguf:q8_0", "gguf:q4_0", *asked]) == 0
    for each in exported_of(known):
        assert each.check["runtime"].startswith("llama.cpp")
        assert each.check["kl"] < {"q8_0": 1e-2, "q4_0": 1.0}[each.spec.quantization], each.name
        assert each.check["same_tokens"] == 1


@pytest.mark.parametrize("modifier", ["gptq", "awq"])
def test_llm_compressor_calibrates_the_codes(student, modifier):  # noqa: F811
    if "LLM_COMPRESSOR" not in os.environ:
        pytest.skip("LLM_COMPRESSOR does not name a Python that has llm-compressor")
    (each,) = export(student, "--format", modifier, "--calibration_rows", "8")
    assert each.record["made_by"]["writer"].startswith("llm-compressor")
    assert each.check["kl"] < 0.3
