"""Samples that a report makes by itself: of text, pictures and classes; bounded, kept, and explained when missing."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmkd.commands.main import main
from mmkd.models.load import load_processing_class
from mmkd.publish import run_samples
from mmkd.publish.report_page import write_report
from mmkd.publish.run_samples import kept_samples, make_samples
from mmkd.publish.runs import read_run
from scripts.make_tiny_models import sentences
from tests.classes import NAMES, pictures, pixels, vit
from tests.teachers.fake_vllm import ServedModel, fake_vllm
from tests.vlms import make_llava, vision_rows


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_samples, "MAX_NEW_TOKENS", 4)


def write_run(folder: Path, method: str, finished: bool = True, **keys: Any) -> Path:
    """The files of a run beside its student."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text(json.dumps({"loss": 1.0, "step": 1, "max_steps": 1}) + "\n")
    times = {"started": "2026-01-01", "finished": "2026-01-02" if finished else None}
    data = {"name": "words", "license": None, "source": "json", "homepage": None}
    record = {"method": method, "keys": {"method": method, **keys}, "data": data, **times}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def run(tiny: dict[str, Path], tmp_path: Path) -> Path:
    """A finished run with a student, a teacher and held-out questions."""
    rows = [{"prompt": a, "completion": f" {b}"} for a, b in zip(sentences(6), sentences(6, seed=1), strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {split: str(tmp_path / "rows.jsonl") for split in ("train", "eval")}
    data = {"source": "json", "data_files": files, "splits": {"train": "train", "eval": "eval"}}
    (tmp_path / "words.yaml").write_text(yaml.safe_dump(data))
    folder = write_run(tmp_path / "run", "kd", teacher=str(tiny["teacher"]), data=str(tmp_path / "words.yaml"))
    AutoModelForCausalLM.from_pretrained(tiny["student"]).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny["student"]).save_pretrained(folder)
    return folder


def test_a_finished_run_gets_samples_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = write_report(run)[1].read_text()
    rows = kept_samples(read_run(run))
    assert len(rows) == run_samples.SAMPLES
    assert all(set(row["answers"]) == {"student", "teacher"} for row in rows)
    assert all(row["prompt"] in page and row["target"].strip() in page for row in rows)
    assert "held-out rows" in rows[0]["source"]
    # Again: they are read.
    monkeypatch.setattr(run_samples, "_answered", None)
    assert rows[0]["prompt"] in write_report(run)[1].read_text()


def test_samples_of_older_weights_are_made_again(run: Path) -> None:
    assert make_samples(read_run(run), 1) == ""
    assert len(kept_samples(read_run(run))) == 1
    import os

    newer = (run / "samples/samples.jsonl").stat().st_mtime + 10
    os.utime(run / "model.safetensors", (newer, newer))
    assert kept_samples(read_run(run)) == []


def test_their_number_is_a_flag(run: Path, tmp_path: Path) -> None:
    assert main(["report", str(run), "--samples", "0", "--output", str(tmp_path / "out")]) == 0
    assert "Left out, as asked for." in (tmp_path / "out/report.md").read_text()
    assert main(["report", str(run), "--samples", "2", "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/report.md").read_text().count("### ") == 2


def test_large_models_answer_only_when_asked(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_samples, "LARGEST", {"cpu": 50_000, "cuda": 50_000})
    assert "teacher, which is too large" in write_report(run)[1].read_text()
    assert set(kept_samples(read_run(run))[0]["answers"]) == {"student"}
    (run / "samples/samples.jsonl").unlink()
    monkeypatch.setattr(run_samples, "LARGEST", {"cpu": 5, "cuda": 5})
    assert "28.2 thousand parameters. `mmkd report RUN --samples 4`" in write_report(run)[1].read_text()
    assert make_samples(read_run(run), 1) == ""


def test_a_served_teacher_answers_or_is_said_to_be_missing(run: Path, tiny: dict[str, Path]) -> None:
    folder = str(tiny["teacher"])
    keys = json.loads((run / "run.json").read_text())["keys"]
    with fake_vllm(ServedModel, root=folder, tokenizer=load_processing_class(folder)) as fake:
        write_run(run, **{**keys, "teacher": folder, "teacher_server": [fake.url]})
        assert make_samples(read_run(run), 2) == ""
    assert all(row["answers"]["teacher"].startswith("served: ") for row in kept_samples(read_run(run)))
    note = make_samples(read_run(run), 2)
    assert note.startswith("Without teacher: ")
    assert fake.url in note
    assert set(kept_samples(read_run(run))[0]["answers"]) == {"student"}


def test_why_there_are_none(run: Path, tmp_path: Path) -> None:
    write_run(run, "kd", finished=False, data="x")
    assert "not finished" in make_samples(read_run(run), None)
    write_run(run, "kd", data=str(tmp_path / "gone.yaml"))
    assert "gone.yaml" in make_samples(read_run(run), None)
    assert "There is no student in" in make_samples(read_run(write_run(tmp_path / "empty", "kd")), None)
    assert "There is no student in" in write_report(tmp_path / "empty")[0].read_text()


def test_pictures_of_the_questions_are_shown(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    make_llava(folder)
    rows = vision_rows([1, 1])
    lines = []
    for number, row in enumerate(rows):
        row["images"][0].save(tmp_path / f"{number}.png")  # pyright: ignore
        lines.append(json.dumps({"messages": row["messages"], "images": [str(tmp_path / f"{number}.png")]}))  # pyright: ignore
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    source = {"source": "json", "data_files": {"train": str(tmp_path / "rows.jsonl")}}
    (tmp_path / "rows.yaml").write_text(
        yaml.safe_dump({**source, "columns": {"messages": "messages", "images": "images"}})
    )
    write_run(folder, "sft", data=str(tmp_path / "rows.yaml"))
    page = write_report(folder)[0].read_text()
    assert "rows it was trained on" in page
    assert page.count("data:image/png") == 2


def test_classes_are_predicted(tmp_path: Path) -> None:
    for split in ("train", "test"):
        pictures(2).to_parquet(str(tmp_path / f"{split}.parquet"))
    files = {split: str(tmp_path / f"{split}.parquet") for split in ("train", "test")}
    data = {"source": "parquet", "data_files": files, "splits": {split: split for split in files}, "image": "image"}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({**data, "class_names": NAMES}))
    folder = write_run(tmp_path / "run", "dho", data=str(tmp_path / "data.yaml"))
    vit().save_pretrained(folder)
    pixels().save_pretrained(folder)
    page = write_report(folder)[0].read_text()
    rows = kept_samples(read_run(folder))
    assert len(rows) == run_samples.SAMPLES
    for row in rows:
        assert row["right"]["student"] == row["answers"]["student"].startswith(f"{row['target']} (")
    assert page.count("data:image/png") == len(rows)
