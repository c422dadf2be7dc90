"""`mmkd compare` end to end: baseline at equal tokens, retention, gains with intervals, cost, restarts."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmkd.commands.main import main
from mmkd.eval import trainings
from mmkd.eval.model import find_model
from mmkd.publish.runs import read_log, record_of
from scripts.make_tiny_models import make_model, make_tokenizer, save, sentences


@pytest.fixture
def workplace(tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data, a task and the recipe kd.yaml."""
    monkeypatch.chdir(tmp_path)
    for split, seed in (("train", 0), ("eval", 1)):
        rows = [json.dumps({"text": text}) for text in sentences(24, seed=seed)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    data: dict[str, Any] = {"name": "words", "license": "CC0-1.0", "source": "json", "columns": {"text": "text"}}
    data["data_files"] = {"train": "train.jsonl", "eval": "eval.jsonl"}
    (tmp_path / "words.yaml").write_text(yaml.safe_dump(data | {"splits": {"train": "train", "eval": "eval"}}))
    recipe = {
        "method": "kd",
        "student": str(tiny["student"]),
        "teacher": str(tiny["teacher"]),
        "data": "words.yaml",
        "output_dir": "run",
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "temperature": 1.0,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }
    (tmp_path / "kd.yaml").write_text(yaml.safe_dump(recipe))
    task = {
        "task": "tiny_text",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "eval.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
    }
    choice = {
        **task,
        "task": "tiny_choice",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": [" cat", " dog", " tree", " a"],
        "doc_to_target": "{{ text | length % 4 }}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/tiny_choice.yaml").write_text(yaml.safe_dump(choice))
    (tmp_path / "tasks/tiny_text.yaml").write_text(yaml.safe_dump(task))
    return tmp_path


def test_one_recipe_against_its_baseline_over_seeds(workplace, monkeypatch, capsys):
    command = ["compare", "kd.yaml", "--seeds", "0", "1", "--output", "out", "--tasks", "tiny_text", "tiny_choice"]
    command += ["--include_path", "tasks"]
    assert main(command) == 0
    found = json.loads(Path("out/comparison.json").read_text())
    rows = {row["role"]: row for row in found["rows"]}
    assert list(rows) == ["teacher", "untrained", "baseline", "student"]
    assert rows["baseline"]["name"] == "sft"
    assert rows["baseline"]["tokens"] == rows["student"]["tokens"]
    assert len(set(rows["student"]["folders"])) == 2
    assert rows["student"]["weights"] == [find_model(folder).weights for folder in rows["student"]["folders"]]
    assert rows["teacher"]["weights"] == [None]
    # Curves and a record of each training, for reports and cards.
    assert read_log(Path(rows["student"]["folders"][0]))
    assert record_of(Path(rows["student"]["folders"][0]))["finished"]
    # Nothing of the teacher enters the baseline's loss, and it is asked nothing.
    assert rows["baseline"]["cost"]["teacher_tokens"] == 0 < rows["student"]["cost"]["teacher_tokens"]
    assert rows["teacher"]["metrics"]["kl"]["mean"] == pytest.approx(0, abs=1e-4)

    student, baseline, teacher = (rows[role]["metrics"] for role in ("student", "baseline", "teacher"))
    gain = rows["student"]["gain_over_sft"]["kl"]
    assert gain["gain"] == pytest.approx(baseline["kl"]["mean"] - student["kl"]["mean"], rel=1e-5)
    assert gain["low"] < gain["gain"] < gain["high"]
    perplexity = rows["student"]["gain_over_sft"]["perplexity"]["gain"]
    assert perplexity == pytest.approx(baseline["perplexity"]["mean"] - student["perplexity"]["mean"], rel=1e-4)
    kept = rows["student"]["retention"]["perplexity"]
    assert kept == pytest.approx(100 * teacher["perplexity"]["mean"] / student["perplexity"]["mean"])

    scores = {role: row["tasks"]["tiny_text bits_per_byte"] for role, row in rows.items()}
    difference = scores["baseline"]["mean"] - scores["student"]["mean"]
    gain = rows["student"]["gain_over_sft"]["tiny_text bits_per_byte"]
    assert gain["gain"] == pytest.approx(difference, rel=1e-5)
    assert set(rows["student"]["gain_over_sft"]) == {*student, "tiny_text bits_per_byte", "tiny_choice acc"}
    changed = abs(
        rows["student"]["tasks"]["tiny_choice acc"]["mean"] - rows["teacher"]["tasks"]["tiny_choice acc"]["mean"]
    )
    assert changed <= rows["student"]["flips"]["tiny_choice acc"] <= 1
    assert list(rows["student"]["flips"]) == ["tiny_choice acc"]
    assert "Gain over SFT" in capsys.readouterr().out
    page = Path("out/comparison.md").read_text()
    assert f"| sft | {rows['baseline']['parameters'] / 1e6:.1f} M | {rows['baseline']['tokens'][0]:,} |" in page

    # Again: nothing is trained, nothing changes.
    monkeypatch.setattr(trainings, "measure", None)
    assert main(command) == 0
    assert json.loads(Path("out/comparison.json").read_text())["rows"] == found["rows"]


def test_with_baseline_is_a_comparison_under_the_runs_folder(workplace, capsys):
    assert main(["train", "kd.yaml", "--with_baseline", "--temperature", "2", "--max_steps", "2"]) == 0
    found = json.loads(Path("run/comparison.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["teacher", "student, untrained", "sft", "kd"]
    assert math.isfinite(found["rows"][-1]["gain_over_sft"]["kl"]["low"])


def test_a_given_baseline_and_none(workplace):
    recipe = yaml.safe_load(Path("kd.yaml").read_text())
    del recipe["temperature"]
    Path("own.yaml").write_text(yaml.safe_dump({**recipe, "method": "sft", "max_steps": 2}))
    assert main(["compare", "own.yaml", "kd.yaml", "--output", "out"]) == 0
    rows = json.loads(Path("out/comparison.json").read_text())["rows"]
    assert [row["role"] for row in rows] == ["teacher", "untrained", "baseline", "student"]
    assert rows[2]["recipe"] == "own.yaml"
    assert main(["compare", "kd.yaml", "--baseline", "none", "--output", "out"]) == 0
    rows = json.loads(Path("out/comparison.json").read_text())["rows"]
    assert [row["role"] for row in rows] == ["teacher", "untrained", "student"]
    assert rows[-1]["gain_over_sft"] == {}


def test_recipes_that_read_the_held_out_rows_differently_need_a_judge(workplace, capsys):
    keys = yaml.safe_load(Path("kd.yaml").read_text())
    Path("packed.yaml").write_text(yaml.safe_dump(keys | {"packing": True, "max_length": 32, "bf16": False}))
    assert main(["compare", "kd.yaml", "packed.yaml", "--baseline", "none", "--output", "out"]) == 2
    message = capsys.readouterr().err
    assert "packing False and True" in message
    assert "--judge kd.yaml" in message
    assert not Path("out").exists()


def test_across_tokenizers_the_students_own_trainer_judges_a_baseline_without_teacher(workplace):
    recipe = yaml.safe_load(Path("kd.yaml").read_text())
    del recipe["temperature"]
    other = make_tokenizer(vocab_size=280)
    save(make_model(rows=len(other), seed=3), other, workplace / "other")
    Path("alm.yaml").write_text(yaml.safe_dump({**recipe, "method": "alm", "student": "other", "max_steps": 2}))
    assert main(["compare", "alm.yaml", "--output", "out"]) == 0
    found = json.loads(Path("out/comparison.json").read_text())
    assert found["judge"] == "alm.yaml"
    assert "teacher" not in yaml.safe_load(Path("out/sft-baseline.yaml").read_text())
    rows = {row["role"]: row for row in found["rows"]}
    assert {"bits_per_byte", "chunk_gap"} <= set(rows["student"]["gain_over_sft"])
    ratio = rows["teacher"]["metrics"]["bits_per_byte"]["mean"] / rows["student"]["metrics"]["bits_per_byte"]["mean"]
    assert rows["student"]["retention"]["bits_per_byte"] == pytest.approx(100 * ratio)
