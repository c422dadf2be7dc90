"""Exports through the converters and runtimes of others, end to end; each skips where its tool is not installed."""

import os
import shutil
from pathlib import Path

import pytest

from mmkd.commands.main import main
from mmkd.export.exported import Exported, exported_of
from mmkd.export.loading import runtime_of
from mmkd.export.vllm_runtime import VARIABLE
from mmkd.generation.generator import Sampling
from scripts.make_tiny_models import make_model, make_tokenizer, save
from tests.export.test_export import export, student, vlm  # noqa: F401

ROOT = Path(__file__).parents[2]
SMOLLM2 = ROOT / ".cache/mmkd/SmolLM2-135M-Instruct"

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


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> str:
    """The Python of scripts/serve_teacher.sh on a CPU."""
    python = ROOT / ".cache/vllm/bin/python"
    if not python.is_file():
        pytest.skip("vLLM is not installed in .cache/vllm: scripts/serve_teacher.sh --setup")
    monkeypatch.setenv(VARIABLE, str(python))
    return str(python)


def test_vllm_computes_what_transformers_does(student, vllm, capsys):  # noqa: F811
    tokenizer = make_tokenizer()
    # A width of 64 gives heads of 32, the least that vLLM's attention on a CPU takes.
    save(make_model(width=64, rows=len(tokenizer), seed=3), tokenizer, wide := Path("wide"))
    asked = ["--data", "words.yaml", "--rows", "4", "--format", "compressed-tensors", "--quantization"]
    assert main(["export", str(wide), *asked, "int4", "int8", "fp8", "mxfp4"]) == 0
    exported = {each.spec.quantization: each for each in exported_of(wide)}
    # Its kernel for INT4 computes in bfloat16.
    for quantization, tolerance in (("int8", 0.3), ("fp8", 0.1), ("int4", 0.1)):
        checks = exported[quantization].checks
        assert checks["vllm"]["runtime"].startswith("vLLM ")
        assert checks["vllm"]["kl"] == pytest.approx(checks["transformers"]["kl"], rel=tolerance), quantization
        assert checks["vllm"]["perplexity"] == pytest.approx(checks["transformers"]["perplexity"], rel=0.05)
        assert checks["vllm"]["tokens"] == checks["transformers"]["tokens"]
        assert exported[quantization].record["warnings"] == []
    (warning,) = exported["mxfp4"].record["warnings"]
    assert "Failed to find a kernel that can implement the MXFP4 linear layer" in warning
    assert "vllm" not in exported["mxfp4"].checks
    assert "vLLM" in capsys.readouterr().out


def test_vllm_reads_the_images_of_an_exported_student(vlm, vllm):  # noqa: F811
    asked = ["--data", "pictures.yaml", "--rows", "3", "--format", "compressed-tensors:int8"]
    assert main(["export", str(vlm), *asked]) == 0
    (exported,) = exported_of(vlm)
    assert exported.record["warnings"] == []
    checks = exported.checks
    assert checks["vllm"]["kl"] == pytest.approx(checks["transformers"]["kl"], rel=0.5)
    assert checks["vllm"]["perplexity"] == pytest.approx(checks["transformers"]["perplexity"], rel=0.05)
