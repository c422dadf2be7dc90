"""Exported students: written, read back by a runtime, and as far from the student as the format says."""

import io
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mmkd.cache.identity import file_sha256
from mmkd.commands.main import main
from mmkd.errors import UserError
from mmkd.eval.model import find_model
from mmkd.export.compressed_writer import write_compressed
from mmkd.export.exported import RECORD, Exported, exported_of, find_exported
from mmkd.export.formats import ExportSpec, spec_of, specs_of
from mmkd.export.llm_compressor import LLMCompressor
from mmkd.export.runtimes import Runtime, Scored, sampled
from mmkd.export.transformers_runtime import TransformersRuntime
from mmkd.generation.generator import Sampling
from mmkd.models.load import load_model
from mmkd.models.quantised_students import StudentQuantisation, quantise_forward, quantise_weights
from mmkd.publish.compared_exports import add_to_comparison, compare_exported
from mmkd.publish.export_table import markdown_of
from mmkd.publish.push_folder import exported_of_student
from mmkd.publish.student_to_export import ExportOptions
from scripts.make_tiny_models import sentences
from tests.vlms import make_llava, picture


@pytest.fixture
def student(tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny student beside the data recipe words.yaml."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in sentences(8, seed=1)))
    data: dict[str, Any] = {"name": "words", "license": "CC0-1.0", "source": "json", "columns": {"text": "text"}}
    data["data_files"] = {"train": "rows.jsonl", "eval": "rows.jsonl"}
    Path("words.yaml").write_text(yaml.safe_dump(data | {"splits": {"train": "train", "eval": "eval"}}))
    return Path(shutil.copytree(tiny["student"], tmp_path / "student"))


def export(student: Path, *words: str, status: int = 0) -> list[Exported]:
    assert main(["export", str(student), "--data", "words.yaml", "--rows", "4", *words]) == status
    return exported_of(student)


def test_formats_and_quantisations_are_named_together_or_apart():
    assert spec_of("gguf:Q4_K_M") == spec_of("gguf") == ExportSpec("gguf", "q4_k_m")
    assert spec_of("compressed_tensors", "int8").name == "compressed-tensors-int8"
    assert spec_of("nvfp4").name == "nvfp4"
    assert specs_of(["gguf", "onnx:int8"], ["q8_0", "f16"]) == [
        ExportSpec("gguf", "q8_0"),
        ExportSpec("gguf", "f16"),
        ExportSpec("onnx", "int8"),
    ]
    with pytest.raises(UserError, match=r"no format 'ggml'.*gguf"):
        spec_of("ggml")
    with pytest.raises(UserError, match=r"onnx has no quantisation 'q4_0'.*fp32"):
        spec_of("onnx:q4_0")


def test_kl_of_listed_tokens_takes_all_others_as_one():
    student = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    whole = Scored.of(torch.tensor([[0.25, 0.25, 0.25, 0.25]]).log(), torch.tensor([1]))
    listed = Scored(torch.tensor([1]), whole.of_labels, whole.log_probs[:, :2], torch.tensor([[0, 1]]))
    assert whole.kl_from(student).item() == pytest.approx(0.25 * torch.tensor(2.0).log().item())
    assert listed.kl_from(student).item() == pytest.approx(
        (0.5 * torch.tensor(2.0).log() + 0.25 * torch.tensor(0.5).log()).item()
    )
    assert listed.top.tolist() == [0]


def test_sampling_takes_the_likeliest_tokens_up_to_their_share():
    logits, generator = torch.tensor([2.0, 1.9, -3.0]), torch.Generator().manual_seed(0)
    assert sampled(logits, Sampling(1), generator) == 0
    drawn = {sampled(logits, Sampling(1, temperature=1.0, top_p=0.9), generator) for _ in range(50)}
    assert drawn == {0, 1}


@pytest.mark.parametrize("format", ["int4", "int8", "fp8", "mxfp4", "nvfp4"])
def test_a_compressed_student_has_the_weights_that_it_was_trained_with(format, tiny, tmp_path):
    pytest.importorskip("compressed_tensors")
    quantisation, ids = StudentQuantisation.of(format, activations=None), list(range(5, 40))
    write_compressed(str(tiny["student"]), tmp_path / "out", quantisation, rows=[{"input_ids": torch.tensor([ids])}])
    exported = TransformersRuntime(str(tmp_path / "out"))
    student: Any = load_model(str(tiny["student"]), dtype="float32").eval()
    names = quantise_forward(student, quantisation)
    trained = TransformersRuntime("", model=student).scored(ids)
    quantise_weights(student, quantisation)
    for name in names:
        # transformers unpacks FP4 in bfloat16.
        tolerance = 2**-8 if format == "nvfp4" else 0
        expected = student.get_submodule(name).weight.data
        torch.testing.assert_close(exported.model.get_submodule(name).weight.data, expected, rtol=tolerance, atol=0)
    scored = exported.scored(ids)
    if format != "nvfp4":
        assert scored.kl_from(trained.log_probs).mean() < 1e-6
    else:
        # Its activations have a scale of the calibration here, and one of each token there: as good, not the same.
        whole = TransformersRuntime(str(tiny["student"])).scored(ids).log_probs
        assert 0.5 < scored.kl_from(whole).mean() / trained.kl_from(whole).mean() < 2
    assert "model.embed_tokens.weight" in load_file(tmp_path / "out/model.safetensors")


def test_layers_that_are_left_out_keep_their_weights(tiny, tmp_path):
    pytest.importorskip("compressed_tensors")
    quantisation = StudentQuantisation.of("int8", activations=False, skip=["down_proj", "layers.0"])
    write_compressed(str(tiny["student"]), tmp_path / "out", quantisation)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert any(name.endswith("down_proj") for name in config["ignore"])
    assert config["config_groups"]["group_0"]["input_activations"] is None
    before, after = load_file(tiny["student"] / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])
    assert "model.layers.1.mlp.up_proj.weight_packed" in after


def test_an_export_is_checked_recorded_and_not_made_twice(student, capsys):
    pytest.importorskip("compressed_tensors")
    (exported,) = export(student, "--format", "compressed-tensors", "--quantization", "int8")
    said = capsys.readouterr()
    check = exported.checks["transformers"]
    assert check["rows"] == 4
    assert 0 < check["kl"] < 1e-3
    assert check["perplexity"] == pytest.approx(check["student_perplexity"], rel=0.01)
    assert check["top1_agreement"] > 0.9
    assert check["tokens_per_second"] > 0
    assert "vLLM was not tried here" in said.err
    assert "compressed-tensors-int8" in said.out
    assert "student" in said.out
    for name, facts in exported.record["files"].items():
        assert (exported.folder / name).stat().st_size == facts["bytes"]
    before = (exported.folder / RECORD).read_text()
    export(student, "--format", "compressed-tensors:int8")
    assert "written already" in capsys.readouterr().err
    assert (exported.folder / RECORD).read_text() == before
    # Another check of the same files.
    (again,) = export(student, "--format", "compressed-tensors:int8", "--max_length", "6")
    assert again.record["date"] == exported.record["date"]
    assert again.check["tokens"] < check["tokens"]
    # Another group is another file.
    (again,) = export(student, "--format", "compressed-tensors:int8", "--skip", "down_proj")
    assert again.record["settings"]["quantisation"]["skip"] == ["down_proj"]


def test_what_cannot_be_exported_is_said_before_anything_is_written(student, tmp_path, monkeypatch, capsys):
    pytest.importorskip("compressed_tensors")
    ask = ["--format", "compressed-tensors:int8"]
    export(student, *ask, "gguf", "--llama_cpp", str(tmp_path), status=2)
    assert f"{tmp_path} has no convert_hf_to_gguf.py" in capsys.readouterr().err
    export(student, "--format", "compressed-tensors:int4", "--group", "24", status=2)
    assert "cannot be cut into groups of 24" in capsys.readouterr().err
    export(student, *ask, "compressed-tensors:fp8", "--output", "out", status=2)
    assert "--output is the folder of one format" in capsys.readouterr().err
    export(student, *ask, "--output", ".", status=2)
    assert "holds something else" in capsys.readouterr().err
    assert main(["export", str(student), *ask, "--data", "nothing.yaml"]) == 2
    assert "nothing.yaml" in capsys.readouterr().err
    assert main(["export", str(student), "--format", "nvfp4"]) == 2
    assert "no run says which" in capsys.readouterr().err
    monkeypatch.setenv("LLM_COMPRESSOR", "/nowhere/python")
    export(student, "--format", "gptq", status=2)
    assert "/nowhere/python is no Python that has llm-compressor" in capsys.readouterr().err
    monkeypatch.delenv("LLM_COMPRESSOR")
    export(student, *ask, "--vllm", "/nowhere/python", status=2)
    assert "/nowhere/python is no Python that has vLLM" in capsys.readouterr().err
    assert exported_of(student) == []


def test_a_student_without_data_is_loaded_and_not_compared(student, capsys):
    pytest.importorskip("compressed_tensors")
    assert main(["export", str(student), "--format", "compressed-tensors:int8"]) == 0
    assert "was not compared with the student: it has no rows to read" in capsys.readouterr().err
    assert "kl" not in exported_of(student)[0].check


def test_exported_students_are_found_by_name_folder_and_file(student, tmp_path):
    folder = student / "exported/gguf-q8_0"
    folder.mkdir(parents=True)
    record = {"schema": 1, "format": "gguf", "quantization": "q8_0", "main": "model-q8_0.gguf"}
    (folder / RECORD).write_text(json.dumps(record))
    (folder / "model-q8_0.gguf").write_text("")
    (tmp_path / "other.gguf").write_text("")
    for wanted in ("gguf-q8_0", "gguf:q8_0", "gguf", str(folder), str(folder / "model-q8_0.gguf")):
        assert find_exported(str(student), wanted).path == folder / "model-q8_0.gguf"
    assert find_exported(str(student), str(tmp_path / "other.gguf")).path == tmp_path / "other.gguf"
    with pytest.raises(UserError, match=r"no exported student 'onnx'.*has gguf-q8_0"):
        find_exported(str(student), "onnx")
    (folder / RECORD).write_text(json.dumps({**record, "schema": 9}))
    with pytest.raises(UserError, match="schema 9"):
        find_exported(str(student), "gguf")


class Parrot(Runtime):
    """A runtime that says the prompt again."""

    name = "parrot 1.0"

    def scored(self, ids: Sequence[int]) -> Scored:
        said = torch.full((len(ids) - 1, 300), -10.0)
        said[torch.arange(len(ids) - 1), torch.tensor(list(ids[1:]))] = 5.0
        return Scored.of(said.log_softmax(-1), torch.tensor(list(ids[1:])))

    def tokens(self, ids: Sequence[int], sampling: Sampling, stops: Sequence[int]) -> Iterator[int]:
        yield from list(ids)[: sampling.max_new_tokens]


@pytest.fixture
def parrot(student: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The student with an exported file that the parrot reads."""
    for module in ("mmkd.export.exported_answers", "mmkd.eval.exported_lm", "mmkd.publish.export_student"):
        monkeypatch.setattr(f"{module}.runtime_of", lambda *arguments: Parrot())
    folder = student / "exported/gguf-q8_0"
    shutil.copytree(student, folder, ignore=shutil.ignore_patterns("exported", "*.safetensors"))
    (folder / "model.gguf").write_bytes(b"GGUF")
    files = {"model.gguf": {"bytes": 4, "sha256": file_sha256(folder / "model.gguf")}}
    record = {"schema": 1, "format": "gguf", "quantization": "q8_0", "main": "model.gguf", "files": files, "bytes": 4}
    record["student"] = {"name": "student", "weights": find_model(str(student)).weights}
    (folder / RECORD).write_text(json.dumps(record))
    return student


def test_an_exported_file_answers_in_a_conversation(parrot, capsys, monkeypatch):
    assert main(["chat", str(parrot), "--exported", "gguf", "--prompt", "the cat", "--side", "student"]) == 0
    assert "the cat" in capsys.readouterr().out
    Path("broken.png").write_bytes(b"no picture")
    lines = "/image\n/image broken.png\nthe dog\n/image broken.png\n/quit\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["chat", str(parrot), "--exported", "gguf", "--max_new_tokens", "8"]) == 0
    said = capsys.readouterr()
    assert "gguf-q8_0: " in said.out
    assert "model: " in said.out
    assert "Write /image PATH" in said.err
    assert "/image cannot be read" in said.err
    assert "Pictures belong to the first question" in said.err


def test_tasks_and_measures_of_an_exported_file_are_by_its_own_runtime(parrot, capsys):
    pages = [{"text": text, "choices": [" cat", " dog"], "answer": 0} for text in sentences(3)]
    Path("pages.jsonl").write_text("\n".join(map(json.dumps, pages)))
    task = {"task": "pages", "dataset_path": "json", "test_split": "test", "output_type": "loglikelihood_rolling"}
    task |= {"dataset_kwargs": {"data_files": {"test": str(Path("pages.jsonl").resolve())}}}
    task |= {"doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": [{"metric": "word_perplexity"}]}
    Path("tasks").mkdir()
    Path("tasks/pages.yaml").write_text(yaml.safe_dump(task))
    asked = ["eval", str(parrot), "--exported", "gguf"]
    assert main([*asked, "--tasks", "pages", "--include_path", "tasks"]) == 0
    assert "word_perplexity" in capsys.readouterr().out
    assert main([*asked, "--measures", "--data", "words.yaml", "--rows", "2"]) == 0
    assert "parrot 1.0" in capsys.readouterr().out
    check = find_exported(str(parrot), "gguf").check
    assert (check["rows"], check["top1_agreement"] < 0.5, check["perplexity"] < 1.01) == (2, True, True)
    assert main(["eval", str(parrot), str(parrot), "--exported", "gguf", "--measures"]) == 2


def test_a_published_file_is_that_of_the_student_and_unchanged(parrot, tmp_path):
    exported, model = find_exported(str(parrot), "gguf"), find_model(str(parrot))
    assert exported_of_student(str(parrot), "gguf", model) == exported
    (exported.folder / "model.gguf").write_bytes(b"GGUG")
    with pytest.raises(UserError, match="has changed since it was exported"):
        exported_of_student(str(parrot), "gguf", model)
    other = exported.with_facts(student={"name": "student", "weights": "0"})
    with pytest.raises(UserError, match="made of other weights"):
        exported_of_student(str(parrot), other.name, model)


@pytest.fixture
def vlm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny LLaVA beside the data recipe pictures.yaml."""
    return vision_student(tmp_path, monkeypatch)


def vision_student(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    rows = []
    for number, question, answer in zip(range(6), sentences(6, seed=1), sentences(6, seed=2), strict=True):
        picture(number).save(f"{number}.png")
        asked = [{"type": "image"}, {"type": "text", "text": question}]
        said = [{"type": "text", "text": answer}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        rows.append({"messages": messages, "image": f"{number}.png"})
    Path("pictures.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data: dict[str, Any] = {"name": "pictures", "license": "CC0-1.0", "source": "json"}
    data["columns"] = {"messages": "messages", "images": "image"}
    data["data_files"] = {"train": "pictures.jsonl", "eval": "pictures.jsonl"}
    Path("pictures.yaml").write_text(yaml.safe_dump(data | {"splits": {"train": "train", "eval": "eval"}}))
    return make_llava(folder / "vlm", seed=2, width=64)


def test_a_vision_language_student_is_exported_with_its_tower_as_it_is(vlm, capsys):
    pytest.importorskip("compressed_tensors")
    ask = ["export", str(vlm), "--data", "pictures.yaml", "--rows", "3", "--format"]
    assert main([*ask, "compressed-tensors:int8", "nvfp4"]) == 0
    before = load_file(vlm / "model.safetensors")
    for each in exported_of(vlm):
        after = load_file(each.folder / "model.safetensors")
        whole = [name for name in before if not name.startswith("language_model.model.layers")]
        assert any("vision_tower" in name for name in whole)
        assert all(torch.equal(before[name], after[name]) for name in whole)
        assert 0 < each.check["kl"] < (0.02 if each.spec.quantization == "int8" else 1), each.name
        assert each.check["rows"] == 3
        # Both names of a layer that is left out: that of the module, and that in the checkpoint.
        left = json.loads((each.folder / "config.json").read_text())["quantization_config"]["ignore"]
        assert {"model.multi_modal_projector.linear_1", "multi_modal_projector.linear_1"} <= {*left}


def test_formats_that_have_no_place_for_images_are_refused_before_they_are_written(vlm, monkeypatch, capsys):
    pytest.importorskip("compressed_tensors")
    pytest.importorskip("onnxscript")
    ask = ["export", str(vlm), "--data", "pictures.yaml", "--rows", "3", "--format", "compressed-tensors:int8"]
    assert main([*ask, "onnx"]) == 2
    assert "vision-language model is not exported to ONNX" in capsys.readouterr().err
    # Any Python that says so has llm-compressor, as far as this goes.
    monkeypatch.setattr(LLMCompressor, "find", lambda python: LLMCompressor("python", "0"))
    assert main([*ask, "gptq"]) == 2
    assert "on rows of text, and those of pictures.yaml have images" in capsys.readouterr().err
    assert exported_of(vlm) == []


def test_a_comparison_has_a_row_for_each_format(student, tmp_path, capsys):
    pytest.importorskip("compressed_tensors")
    rows = [{"role": "teacher", "name": "teacher", "folders": ["nowhere"]}]
    rows.append({"role": "student", "name": "kd", "folders": [str(student)]})
    place, page = tmp_path / "comparison.json", tmp_path / "comparison.md"
    place.write_text(json.dumps({"rows": rows}))
    page.write_text("A page.\n")
    options = ExportOptions(data="words.yaml", rows=2, max_length=32)
    lines = compare_exported({"rows": rows}, [spec_of("compressed-tensors:int8")], options, print)
    assert [(line["student"], line["format"], line["seeds"]) for line in lines] == [
        ("kd", "compressed-tensors-int8", 1)
    ]
    assert 0 < lines[0]["kl"] < 1e-3
    add_to_comparison(lines, place, page)
    assert json.loads(place.read_text())["exported"] == lines
    assert "| kd | compressed-tensors-int8 |" in page.read_text()
    card = markdown_of([find_exported(str(student), "compressed-tensors")])
    assert card.splitlines()[2].startswith("| compressed-tensors-int8 | ")
    assert main(["compare", "kd/quickstart", "--exported", "gguff"]) == 2
    assert "no format 'gguff'" in capsys.readouterr().err
