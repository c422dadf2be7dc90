"""What students say themselves: read by the student itself, by another teacher, behind a view, and in a comparison."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset

from mmkd.commands.main import main
from mmkd.data.teacher_view import TeacherView
from mmkd.errors import UserError
from mmkd.eval.model import find_model
from mmkd.eval.own_answers import METRICS, OwnAnswers
from mmkd.results.tables import tables
from scripts.make_tiny_models import sentences


@pytest.fixture
def rows() -> Dataset:
    return Dataset.from_dict({"prompt": sentences(6, seed=3), "completion": [f" {s}" for s in sentences(6, seed=4)]})


def test_a_student_that_is_its_teacher_is_at_no_distance_from_it(tiny, rows):
    metrics, items = OwnAnswers(rows, find_model(str(tiny["student"])), tokens=8).measure(tiny["student"])
    assert metrics.keys() == items.keys() == METRICS.keys()
    assert metrics["own_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["own_agreement"] == 1
    # Of samples at temperature 1 the likelihood is the entropy, but for chance.
    assert metrics["own_teacher_nats"] == pytest.approx(metrics["own_entropy"], rel=0.3)
    assert 0 < metrics["own_tokens"] <= 8
    assert {len(own) for own in items.values()} == {6}


def test_the_teacher_reads_the_same_answer_behind_a_prompt_of_its_own(tiny, rows, monkeypatch):
    read: list[tuple[Any, list[int]]] = []
    own = OwnAnswers(rows, find_model(str(tiny["teacher"])), tokens=8)
    plain, _ = own.measure(tiny["student"])
    teacher = own._teacher.model
    forward = teacher.forward
    monkeypatch.setattr(
        teacher,
        "forward",
        lambda *args, **inputs: read.append(inputs["input_ids"][0].tolist()) or forward(*args, **inputs),
    )
    viewed = replace(own, view=TeacherView(template="{prompt} {answer} ."))
    viewed.__dict__["_teacher"] = own._teacher
    metrics, items = viewed.measure(tiny["student"])
    tokenizer: Any = find_model(str(tiny["teacher"])).processing_class
    starts = [tokenizer(f"{row['prompt']} {row['completion']} .")["input_ids"] for row in rows]
    assert [ids[: len(start)] for ids, start in zip(read, starts, strict=True)] == starts
    # By hand, of the first answer.
    answer = read[0][len(starts[0]) :]
    assert items["own_teacher_nats"][0][1] == len(answer)
    with torch.no_grad():
        log_probs = (
            forward(input_ids=torch.tensor(read[:1])).logits[0, len(starts[0]) - 1 : -1].float().log_softmax(-1)
        )
    nats = -log_probs[torch.arange(len(answer)), torch.tensor(answer)].double().sum()
    assert items["own_teacher_nats"][0][0] == pytest.approx(float(nats), rel=1e-5)
    # The student says the same, whoever reads it.
    assert metrics["own_entropy"] == plain["own_entropy"]
    assert metrics["own_kl"] != plain["own_kl"]
    assert viewed.key != own.key


def test_a_comparison_measures_own_answers_of_adapters_that_taught_themselves(tiny):
    rows = [json.dumps({"text": text}) for text in sentences(12)]
    Path("rows.jsonl").write_text("\n".join(rows))
    data: dict[str, Any] = {"name": "words", "license": "CC0-1.0", "source": "json", "columns": {"text": "text"}}
    files = {"data_files": {"train": "rows.jsonl", "eval": "rows.jsonl"}, "splits": {"train": "train", "eval": "eval"}}
    Path("words.yaml").write_text(yaml.safe_dump(data | files))
    keys = {"method": "kd", "student": str(tiny["student"]), "teacher": "self", "data": "words.yaml"}
    keys |= {"on_policy_fraction": 0.5, "rollout_prompt_tokens": 4, "rollout_max_tokens": 4}
    keys |= {"self_teacher": "base", "use_peft": True, "lora_target_modules": "all-linear", "learning_rate": 1e-2}
    keys |= {
        "max_steps": 2,
        "teacher_view": {"template": "the cat ."},
        "bf16": False,
        "save_strategy": "no",
        "report_to": "none",
    }
    Path("kd.yaml").write_text(yaml.safe_dump(keys))
    assert main(["compare", "kd.yaml", "--baseline", "none", "--own_answers", "3", "--output", "out"]) == 0
    found = json.loads(Path("out/comparison.json").read_text())
    rows = {row["role"]: row for row in found["rows"]}
    for row in rows.values():
        assert METRICS.keys() <= row["metrics"].keys()
    # A teacher with a view, asked the students' questions without it, would be the untrained student.
    assert rows.keys() == {"untrained", "student"}
    assert not any(row["retention"] for row in rows.values())
    assert rows["student"]["metrics"]["own_kl"] != rows["untrained"]["metrics"]["own_kl"]
    assert [title for title, _, _ in tables(found)][:2] == ["", "The models' own answers"]
    # A whole model of each is made to be judged, and is not kept.
    assert not list(Path("out").rglob("whole"))


def test_an_answer_that_the_teacher_has_no_room_for(tiny, rows):
    long = TeacherView(template="{prompt} " * 200)
    with pytest.raises(UserError, match="does not fit into the teacher's context"):
        OwnAnswers(rows, find_model(str(tiny["teacher"])), long, tokens=8).measure(tiny["student"])


def test_rows_with_images_are_refused(tiny, rows):
    pictures = Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "images": [[]]})
    with pytest.raises(UserError, match="the held-out rows have images"):
        OwnAnswers(pictures, find_model(str(tiny["teacher"])))
