"""Measurements beyond benchmarks: by hand, against training's own evaluation, and end to end."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mmkd.commands.main import main
from mmkd.data.load_data import load_data
from mmkd.data.prompts import prompt_of
from mmkd.eval.answer_statistics import greedy_answers, summary
from mmkd.eval.model import find_model
from mmkd.eval.tokens import Beliefs, Calibration, TokenAgreement, batches, beliefs_of
from mmkd.methods.kd import KDTrainer
from mmkd.models.load import load_model, load_processing_class
from mmkd.results.places import results_folder
from scripts.make_tiny_models import make_model, make_tokenizer, save, sentences
from tests.vlms import make_llava, vision_rows


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the data recipe words.yaml."""
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"text": text}) for text in sentences(6, seed=1)]
    Path("eval.jsonl").write_text("\n".join(rows))
    data: dict[str, Any] = {"name": "words", "license": "CC0-1.0", "source": "json", "columns": {"text": "text"}}
    data["data_files"] = {"train": "eval.jsonl", "eval": "eval.jsonl"}
    Path("words.yaml").write_text(yaml.safe_dump(data | {"splits": {"train": "train", "eval": "eval"}}))
    return tmp_path


def said(log_probs: list[list[float]], labels: list[int]) -> Beliefs:
    return Beliefs(torch.tensor(log_probs).log(), torch.tensor(labels))


def test_agreement_by_hand():
    agreement = TokenAgreement()
    agreement.add(said([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]], [0, 0]), said([[0.5, 0.5, 0.0], [0.6, 0.2, 0.2]], [0, 0]))
    found = agreement.result()
    forward = 0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.2)
    forward += 0.6 * math.log(6) + 0.2 * math.log(0.25) + 0.2 * math.log(2)
    assert found["kl"] == pytest.approx(forward / 2, rel=1e-5)
    assert found["top1_agreement"] == 0.5
    assert (found["flips"], found["flips_to_wrong"], found["flips_to_right"]) == (0.5, 0.5, 0)
    assert (found["student_accuracy"], found["teacher_accuracy"]) == (0.5, 1)


def test_calibration_error_is_the_gap_between_confidence_and_accuracy_weighted_by_bins():
    calibration = Calibration(bins=2)
    calibration.add(torch.tensor([0.9, 0.7, 0.5, 0.3]), torch.tensor([True, True, False, True]))
    found = calibration.result()
    # Bins (0, 0.5] and (0.5, 1]: confidence 0.4 and 0.8, accuracy 0.5 and 1.
    assert found["ece"] == pytest.approx(0.5 * 0.1 + 0.5 * 0.2)
    assert [one["accuracy"] for one in found["bins"]] == [0.5, 1]
    sure = Calibration()
    sure.add(torch.ones(8), torch.tensor([True] * 8))
    assert sure.result()["ece"] == 0


def test_chats_are_supervised_on_the_answers_with_any_template(tiny, chats):
    processing_class = find_model(str(tiny["student"])).processing_class
    model, found = load_model(str(tiny["student"]), dtype="float32"), []
    marked = processing_class.chat_template
    for template in (marked, marked.replace("{% generation %}", "").replace("{% endgeneration %}", "")):
        processing_class.chat_template = template
        views = [batch.ours for batch in batches(model, processing_class, chats.select(range(3)), 64)]
        found.append([view.labels[0][view.labels[0] != -100].tolist() for view in views])
    assert found[0] == found[1]
    assert processing_class.decode(found[0][0]) == chats[0]["messages"][1]["content"] + "<|end|>"


@pytest.mark.parametrize("kind", ["texts", "chats", "images"])
def test_agreement_is_what_training_evaluates(kind, tiny, build, texts, chats, tmp_path):
    if kind == "images":
        folders = {
            "student": make_llava(tmp_path / "a", seed=1),
            "teacher": make_llava(tmp_path / "b", seed=2, layers=3),
        }
        rows = vision_rows([1, 2, 1, 1])
    else:
        folders, rows = tiny, (texts if kind == "texts" else chats).select(range(5))
    models = {side: load_model(str(folders[side]), dtype="float32") for side in ("student", "teacher")}
    asked = [find_model(str(folders[side])) for side in ("student", "teacher")]
    agreement = TokenAgreement()
    for batch in batches(models["student"], asked[0].processing_class, rows, 64, asked[1]):
        agreement.add(
            beliefs_of(models["student"].eval(), batch.ours), beliefs_of(models["teacher"].eval(), batch.theirs)
        )
    names = {"model": str(folders["student"]), "teacher": str(folders["teacher"])}
    trainer = build(
        KDTrainer, rows, {**names, "eval_dataset": rows}, max_length=64, assistant_only_loss=kind != "texts"
    )
    metrics = trainer.evaluate()
    found = agreement.result()
    assert found["kl"] == pytest.approx(metrics["eval_kl"], rel=1e-4)
    assert found["top1_agreement"] == pytest.approx(metrics["eval_top1_agreement"])
    assert found["rows"] == len(rows)


def test_generations_end_repeat_and_do_not_depend_on_their_batch(tiny):
    tokenizer = make_tokenizer()
    model: Any = load_model(str(tiny["teacher"]), dtype="float32").eval()
    prompts = sentences(5, low=3, high=9)
    alone = [greedy_answers(model, tokenizer, [prompt], 12)[0] for prompt in prompts]
    assert greedy_answers(model, tokenizer, prompts, 12) == alone
    assert all(answer.ended or answer.tokens == 12 for answer in alone)
    with torch.no_grad():
        # It says the end-of-sequence token and nothing else.
        model.model.norm.weight.zero_()
    model.generation_config.eos_token_id = 0
    ended = greedy_answers(model, tokenizer, prompts, 12)
    assert summary(ended) == {"answers": 5, "tokens": 0, "characters": 0, "ended": 1, "empty": 1, "repeated": 0}
    model.generation_config.eos_token_id = 7
    (endless,) = greedy_answers(model, tokenizer, prompts[:1], 12)
    assert (endless.ended, endless.tokens, endless.repeated) == (False, 12, 1 - 1 / 9)


def test_prompts_of_all_kinds_of_rows(chats):
    asked: Any
    asked, answer = prompt_of(dict(chats[0]))
    assert ([message["role"] for message in asked], answer) == (["user"], chats[0]["messages"][1]["content"])
    text = "word " * 100
    start: Any
    start, rest = prompt_of({"text": text})
    assert start + rest == text
    assert len(start) <= 200
    assert prompt_of({"prompt": "a", "completion": " b"}) == ("a", " b")
    asked, _ = prompt_of(vision_rows([1])[0])
    assert asked[0]["content"][0]["type"] == "image"


def test_all_measures_from_the_command_line_are_kept(tiny, workplace, capsys, monkeypatch):
    command = ["eval", str(tiny["student"]), "--teacher", str(tiny["teacher"]), "--data", "words.yaml", "--rows", "4"]
    command += ["--measures", "--max_new_tokens", "5", "--dtype", "float32", "--output", "out"]
    assert main(command) == 0
    kept = json.loads(Path("out/results.json").read_text())["measures"].values()
    found = {entry["measure"]: entry["values"] for entry in kept}
    assert list(found) == ["cost", "generation", "own_answers", "bytes", "acceptance", "agreement", "calibration"]
    models = {side: load_model(str(tiny[side]), dtype="float32").eval() for side in ("student", "teacher")}
    assert found["cost"]["teacher"]["parameters"] == models["teacher"].num_parameters()
    assert found["cost"]["student"]["speed"][0]["tokens_per_second"] > 0
    assert set(found["generation"]["samples"][0]) == {"prompt", "reference", "student", "teacher"}
    tokenizer, total, size = make_tokenizer(), 0.0, 0
    for text in load_data("words.yaml", max_eval_rows=4)["eval"]["text"]:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
        log_probs = models["student"](ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
        total, size = total - log_probs.sum().item(), size + len(text.encode())
    assert found["own_answers"]["answers"] == 4
    assert found["own_answers"]["kl"] > 0
    assert found["bytes"]["student"]["bits_per_byte"] == pytest.approx(total / size / math.log(2), rel=1e-5)
    assert "top1_agreement" in capsys.readouterr().out
    monkeypatch.setattr("mmkd.eval.measures.Measurements.cost", None)
    assert main(command) == 0


def test_a_run_is_measured_on_its_data_beside_its_teacher(tiny, workplace, capsys):
    shutil.copytree(tiny["student"], "runs/kd")
    keys = {"method": "kd", "data": "words.yaml", "teacher": str(tiny["teacher"])}
    Path("runs/kd/run.json").write_text(json.dumps({"method": "kd", "keys": keys}))
    command = ["eval", "runs/kd", "--measures", "--rows", "2", "--max_new_tokens", "2", "--output"]
    assert main([*command, "out"]) == 0
    kept = json.loads(Path("out/results.json").read_text())["measures"].values()
    assert [entry["measure"] for entry in kept] == [
        "cost",
        "generation",
        "own_answers",
        "bytes",
        "acceptance",
        "agreement",
        "calibration",
    ]
    said = capsys.readouterr().err
    assert "runs/kd: measured on the held-out rows of words.yaml; --data names others." in said
    assert f"runs/kd: measured beside {tiny['teacher']}; --teacher names another." in said
    Path("words.yaml").unlink()
    assert main([*command, "again", "--teacher", str(tiny["teacher"])]) == 0
    assert "runs/kd: not measured on the data of its run." in capsys.readouterr().err
    assert [entry["measure"] for entry in json.loads(Path("again/results.json").read_text())["measures"].values()] == [
        "cost"
    ]


def test_models_of_different_vocabularies_are_compared_in_bytes(tiny, workplace, capsys):
    other = make_tokenizer(vocab_size=280)
    save(make_model(rows=len(other), seed=3), other, workplace / "other")
    command = ["eval", "other", "--teacher", str(tiny["teacher"]), "--data", "words.yaml", "--rows", "2"]
    assert main([*command, "--measures", "--max_new_tokens", "2"]) == 0
    kept = json.loads((results_folder("other") / "results.json").read_text())["measures"].values()
    assert [entry["measure"] for entry in kept] == ["cost", "generation", "bytes"]
    values = next(entry["values"] for entry in kept if entry["measure"] == "bytes")
    assert values["student"]["bytes"] == values["teacher"]["bytes"]
    assert values["student"]["tokens"] > values["teacher"]["tokens"]
    assert "agreement is left out" in capsys.readouterr().err
    assert main([*command, "--measures", "agreement"]) == 2
    assert "different vocabularies" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--measures", "speed"], "choose some of cost"),
        (["--measures", "bytes"], "name a data recipe"),
        (["--measures", "agreement", "--data", "words.yaml"], "name it with --teacher"),
    ],
)
def test_bad_input(tiny, workplace, capsys, flags, message):
    assert main(["eval", str(tiny["student"]), *flags]) == 2
    assert message in capsys.readouterr().err


def test_rows_with_images_are_generated_from(tmp_path):
    folder = make_llava(tmp_path / "llava")
    rows = vision_rows([1, 1, 1])
    prompts = [prompt_of(dict(row))[0] for row in rows]
    answers = greedy_answers(load_model(str(folder)).eval(), load_processing_class(str(folder)), prompts, 3)
    assert len(answers) == 3
