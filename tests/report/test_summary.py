"""The box that a report opens with, and axes that can be read."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mmkd.publish.curves import draw
from mmkd.publish.measured import NOT_MEASURED
from mmkd.publish.report_page import write_report
from mmkd.publish.runs import read_run
from mmkd.publish.summary import Summary, short_name, summary_of
from mmkd.results.parameters import parameters_of
from mmkd.units import readable_count


def write_run(folder: Path, entries: list[dict[str, Any]], method: str = "kd", **keys: Any) -> Path:
    """A finished run with a log and a record."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(f"{json.dumps({**entry, 'max_steps': 10})}\n" for entry in entries))
    data = {"name": keys.get("data", "words"), "license": None, "source": "json", "homepage": None}
    machine = {"device": "cpu", "processor": "a CPU", "threads": 2, "versions": {"torch": "2.13.0"}}
    record = {"method": method, "recipe": "x.yaml", "keys": {"method": method, **keys}, "data": data}
    times = {"started": "2026-01-01", "finished": "2026-01-02"}
    (folder / "run.json").write_text(json.dumps({**record, "machine": machine, **times}))
    return folder


def trained(**evaluation: float) -> list[dict[str, Any]]:
    """A log of ten steps with an evaluation after the last one."""
    counts = {"supervised_tokens": 1234, "training_seconds": 90.0}
    return [
        {"loss": 1.0, "step": 5},
        {"loss": 0.5, "step": 10, **counts},
        {"eval_loss": 1.0, "step": 10, **evaluation},
    ]


def summary(folder: Path) -> Summary:
    box = summary_of(read_run(folder))
    assert box is not None
    return box


def test_the_box_says_who_taught_whom_at_which_cost(tmp_path: Path, tiny: dict[str, Path]) -> None:
    entries = [{"eval_loss": 2.0, "eval_kl": 2.5, "eval_perplexity": 1234.5, "step": 0}]
    entries += trained(eval_kl=0.25, eval_perplexity=17.23, eval_top1_agreement=0.5)
    folder = write_run(tmp_path / "mine", entries, teacher=str(tiny["teacher"]), student=str(tiny["student"]))
    box = summary(folder)
    assert (box.teacher, box.student) == ("teacher", "mine")
    facts = dict(box.facts)
    sizes = [readable_count(parameters_of(str(tiny[side])) or 0) for side in ("teacher", "student")]
    assert facts["Parameters"] == f"teacher {sizes[0]} → student {sizes[1]}, 2.7 times smaller"
    assert facts["Cost"] == "1,234 supervised tokens, 1 min 30 s of training, a CPU, 2 threads"
    assert (facts["Method"], facts["Data"], facts["Start"]) == ("kd", "words", "student")
    assert list(box.header) == ["measure", "before", "after", "teacher"]
    assert box.lines == [
        ["perplexity ↓", "1,234", "17.2", NOT_MEASURED],
        ["KL to the teacher (nats) ↓", "2.5", "0.25", "0"],
        ["top-1 agreement with the teacher ↑", NOT_MEASURED, "0.5", "1"],
    ]
    for page in write_report(folder):
        assert "teacher → mine" in page.read_text()
        assert "Run mine" in page.read_text()


def test_what_was_not_measured_is_said_with_what_would_measure_it(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", trained(eval_kl=0.25), teacher="big/model")
    box = summary(folder)
    assert box.lines == [["KL to the teacher (nats) ↓", NOT_MEASURED, "0.25", "0"]]
    assert any("eval_on_start: true" in note for note in box.notes)
    assert dict(box.facts)["Parameters"].endswith("the teacher's weights are not on this machine")
    assert "<code>eval_on_start: true</code>" in write_report(folder)[0].read_text()


def test_an_evaluation_before_training_is_none_after_it(tmp_path: Path) -> None:
    box = summary(write_run(tmp_path / "run", [{"eval_loss": 1.0, "eval_kl": 2.0, "step": 0}], teacher="big/model"))
    assert box.lines == [["KL to the teacher (nats) ↓", "2", NOT_MEASURED, "0"]]


def test_a_baseline_has_no_teacher_to_learn_from(tmp_path: Path) -> None:
    box = summary(write_run(tmp_path / "sft", trained(eval_perplexity=3.0), method="sft", student="a/b"))
    assert (box.teacher, list(box.header)) == ("", ["measure", "before", "after"])


def test_stages_on_other_rows_do_not_measure_the_student_before(tmp_path: Path) -> None:
    first = [{"eval_loss": 9.0, "eval_kl": 9.0, "step": 0}, *trained(eval_kl=5.0)]
    write_run(tmp_path / "run/1-PT", first, data="captions", teacher="t")
    write_run(tmp_path / "run/2-SFT", trained(eval_kl=0.5), data="questions", teacher="t")
    box = summary(tmp_path / "run")
    assert box.lines == [["KL to the teacher (nats) ↓", NOT_MEASURED, "0.5", "0"]]
    assert dict(box.facts)["Data"] == "captions, questions"
    assert dict(box.facts)["Cost"].startswith("2,468 supervised tokens, 3 min")


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.1, 0.9, "student is better than SFT in KL by 0.5"),
        (-0.9, -0.1, "student is worse than SFT in KL by 0.5"),
        (-0.1, 0.9, "student: no difference from SFT is shown in KL"),
    ],
)
def test_the_verdict_is_what_the_interval_says(tmp_path: Path, low: float, high: float, verdict: str) -> None:
    folder = write_run(tmp_path / "kd", trained(), teacher="t")
    metric = {"kl": {"mean": 1.0, "std": 0.25, "values": [1.0], "title": "KL", "higher_is_better": False}}
    cost = {"unit": "CPU-hours", "hours": 1.0, "tokens_per_second": 9.0, "teacher_tokens": 5}
    rows = []
    for role in ("teacher", "untrained", "baseline", "student"):
        gain = {"kl": {"gain": 0.5, "low": low, "high": high, "level": 0.95}} if role == "student" else {}
        facts = {"name": role, "role": role, "folders": [str(folder)], "parameters": 10, "tokens": [3], "flips": {}}
        more = {"metrics": metric, "tasks": {}, "retention": {}, "gain_over_sft": gain, "cache": None}
        rows.append({**facts, **more, "cost": cost if role == "student" else None})
    machine = {"device": "cpu", "processor": "", "threads": 1, "versions": {"torch": "2"}}
    comparison = {"schema": 1, "seeds": [0, 1], "machine": machine, "rows": rows}
    (folder / "comparison.json").write_text(json.dumps(comparison))
    box = summary(folder)
    models = ["before", "after, SFT", "after, student", "teacher"]
    assert list(box.header) == ["measure", *models, "gain over SFT, 95 %"]
    assert box.lines == [["KL ↓", *["1 ± 0.25"] * 4, f"+0.5 [{low:+.3g}, {high:+.3g}]"]]
    assert box.verdict[0].startswith(verdict)
    assert "2 seeds" in box.verdict[0]
    # What the comparison says itself is taken.
    said = ["student is better than SFT.", "other is better than SFT."]
    (folder / "comparison.json").write_text(json.dumps({**comparison, "verdicts": said}))
    assert summary(folder).verdict == said[:1]


def test_parameters_are_read_from_headers(tmp_path: Path, tiny: dict[str, Path]) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    for folder in tiny.values():
        assert parameters_of(str(folder)) == AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    (tmp_path / "adapter").mkdir()
    save_file(
        {"a": torch.zeros(2, 3), "steps": torch.zeros((), dtype=torch.int64)}, tmp_path / "adapter/model.safetensors"
    )
    assert parameters_of(str(tmp_path / "adapter")) == 6
    (tmp_path / "adapter/model.safetensors").rename(tmp_path / "adapter/adapter_model.safetensors")
    (tmp_path / "adapter/adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tiny["student"])})
    )
    assert parameters_of(str(tmp_path / "adapter")) == 6 + (parameters_of(str(tiny["student"])) or 0)
    save_file({"packed": torch.zeros(3, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    assert parameters_of(str(tmp_path)) is None
    assert parameters_of("nobody/nothing") is None
    assert parameters_of("./nowhere") is None


def test_names_and_counts_are_short() -> None:
    assert short_name("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
    assert short_name("/models/big/llama") == "llama"
    assert short_name("runs/vqa/teacher/2-SFT") == "teacher/2-SFT"
    assert [readable_count(n) for n in (7, 28_192, 999_960, 134_515_008, 7_616_000_000)] == [
        "7",
        "28.2 thousand",
        "1.0 million",
        "134.5 million",
        "7.6 billion",
    ]


def test_stage_names_stand_above_the_plot(tmp_path: Path) -> None:
    for name in ("1-DPT", "2-SFT"):
        write_run(tmp_path / "run" / name, trained(eval_kl=1.0))
    svg = draw(read_run(tmp_path / "run"))[0].svg.decode()
    axes = re.search(r'<g id="patch_2">\s*<path d="([^"]+)"', svg)
    assert axes is not None
    top = min(float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", axes[1]))
    # In SVG, y grows downwards.
    places = [float(y) for y in re.findall(r' y="([\d.]+)"[^>]*>(?:1-DPT|2-SFT)<', svg)]
    assert len(places) == 2
    assert max(places) < top


def test_a_logarithmic_axis_has_plain_numbers(tmp_path: Path) -> None:
    entries = [{"eval_loss": 1.0, "eval_perplexity": value, "step": step} for step, value in ((0, 517.0), (10, 19.0))]
    figures = {figure.title: figure.svg.decode() for figure in draw(read_run(write_run(tmp_path / "run", entries)))}
    words = re.findall(r"<text[^>]*>([^<]+)</text>", figures["Perplexity on held-out rows"])
    assert {"20", "50", "100", "200", "500"} <= set(words)


def test_stages_with_long_names_and_other_rows(tmp_path: Path) -> None:
    """Names that are wider than their stages stand upright, and a last value is one that was measured."""
    for number, name in enumerate(("1-PT", *(f"{n}-AStageOfAVeryLongName" for n in range(2, 9)))):
        held = {"eval_kl": 1.0} if number == 0 else {}
        write_run(tmp_path / "run" / name, trained(**held), data=f"data {number}")
    figures = {figure.title: figure for figure in draw(read_run(tmp_path / "run"))}
    kl = figures["KL to the teacher"]
    assert kl.words == "kl, held out: 1 at 10"
    assert len(re.findall(r"rotate\(-90[^>]*>\d-", kl.svg.decode())) == 8


def test_classes_have_no_tokens_and_a_time_of_their_own(tmp_path: Path) -> None:
    entries = [{"loss": 1.0, "step": 10}, {"eval_accuracy": 0.5, "step": 10}, {"train_runtime": 75.0, "step": 10}]
    folder = write_run(tmp_path / "run", entries, method="dho", teacher="clip")
    assert dict(summary(folder).facts)["Cost"] == "10 steps, 1 min 15 s of training, a CPU, 2 threads"
    page = write_report(folder)[1].read_text()
    assert "| training | method | data | steps | time |" in page
    assert "| accuracy ↑ | not measured | 0.5 | not measured |" in page
