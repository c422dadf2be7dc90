"""What mmkd 0.1 left behind is gone on with and read: `tests/compat/make.py` made it, at commit 2ca031e."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import mmkd
from mmkd.commands.main import main
from tests.compat.make import COMPARE, HERE, PARSED, PLACE, TASKS, is_of_time
from tests.compat.values import values_of

PUBLIC = [
    *(
        f"{method}{kind}"
        for method in ("ALM", "CoMD", "DHO", "KD", "LLaVAKD", "TAID")
        for kind in ("Config", "Trainer")
    ),
    *("SFTBaselineConfig", "SFTBaselineTrainer", "CachedTeacher", "LocalTeacher", "ServerTeacher"),
    *("DualHeadForImageClassification", "DualHeadForSequenceClassification"),
]
CASES = json.loads(PARSED.read_text())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder that a user of 0.1 worked in; the paths in it are relative to it."""
    shutil.copytree(PLACE, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of every file in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same_log(folder: str, name: str, after: int = 0) -> None:
    """A training logged what the one that 0.1 did not have to interrupt had logged after a step."""
    expected = [entry for entry in json.loads(Path("expected.json").read_text())[name] if entry["step"] > after]
    logged = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
    logged = [entry for entry in logged if entry["step"] > after]
    assert len(logged) == len(expected)
    assert any("loss" in entry for entry in expected)
    for ours, theirs in zip(logged, expected, strict=True):
        if "train_loss" not in theirs:
            # Of the last entry this is the mean over the session.
            ours = {key: value for key, value in ours.items() if not is_of_time(key)}
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", ["kd", "taid", "dho", "adapter"])
def test_a_training_goes_on_from_its_checkpoint(place: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = files_of(place / "caches/classes")
    assert main(["train", f"{name}.yaml", "--resume_from_checkpoint", "true"]) == 0
    assert_same_log(f"runs/{name}", name, after=3)
    assert json.loads(Path(f"runs/{name}/run.json").read_text())["finished"]
    # What the classifier's teacher said is read and not asked for again.
    assert "Asking the teacher" not in capsys.readouterr().err
    assert files_of(place / "caches/classes") == teacher


def test_stages_go_on_after_the_first(place: Path) -> None:
    first = files_of(place / "runs/stages/1-SFT")
    assert main(["train", "stages.yaml"]) == 0
    assert files_of(place / "runs/stages/1-SFT") == first
    assert_same_log("runs/stages/2-KD", "stages")


def test_rounds_go_on_after_the_first(place: Path) -> None:
    student = files_of(place / "runs/comd/round-0/student")
    answers = Path("runs/comd/round-0/answers.jsonl").read_bytes()
    record = Path("runs/comd/record.jsonl").read_text().splitlines()
    assert main(["train", "comd.yaml", "--rounds", "1"]) == 0
    assert files_of(place / "runs/comd/round-0/student") == student
    assert Path("runs/comd/round-0/answers.jsonl").read_bytes() == answers
    # What was asked once is under the same names, so that nothing is asked again.
    after = Path("runs/comd/record.jsonl").read_text().splitlines()
    assert after[: len(record)] == record
    names = [json.loads(line)["key"] for line in after]
    assert len(set(names)) == len(names)
    assert_same_log("runs/comd/round-1/student", "comd")


@pytest.mark.parametrize("name", ["cached", "drawn", "alm"])
def test_a_cache_is_intact_and_teaches_as_it_did(place: Path, name: str) -> None:
    before = files_of(place / "caches")
    assert main(["cache", "verify", f"{name}.yaml"]) == 0
    # It is complete and of the same teacher, data and settings: there is nothing to build.
    assert main(["cache", "build", f"{name}.yaml"]) == 0
    after = files_of(place / "caches")
    assert {path: after[path] for path in before} == before
    assert main(["train", f"{name}.yaml", "--output_dir", "runs/again"]) == 0
    assert_same_log("runs/again", name)


def test_parts_of_a_cache_are_merged_into_what_one_build_writes(place: Path) -> None:
    assert main(["cache", "merge", "caches/parted"]) == 0
    assert main(["cache", "verify", "caches/parted"]) == 0
    merged, whole = files_of(place / "caches/parted"), files_of(place / "caches/top_k")
    assert {path for path in whole if path.endswith(".arrow")} == {path for path in merged if path.endswith(".arrow")}
    assert all(merged[path] == content for path, content in whole.items() if path.endswith(".arrow"))


def test_answers_of_a_teacher_are_a_data_set(place: Path) -> None:
    before = files_of(place / "caches/answers")
    assert main(["cache", "verify", "caches/answers"]) == 0
    assert main(["cache", "build", "generate.yaml", "--teacher_cache", "caches/answers"]) == 0
    after = files_of(place / "caches/answers")
    assert {path: after[path] for path in before} == before
    flags = ["--job", "score", "--data", "caches/answers/data.yaml", "--max_steps", "1", "--output_dir", "runs/again"]
    assert main(["train", "generate.yaml", *flags]) == 0


def test_results_are_not_measured_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Path("runs/finished/eval/results.json")
    before = results.read_bytes()
    entries = json.loads(before)["tasks"].values()
    if {entry["harness_version"] for entry in entries} != {version("lm_eval")}:
        pytest.skip("results are those of one version of lm-eval, and this is another")
    assert main(["eval", "runs/finished", *TASKS]) == 0
    # A task that ran again would have another date.
    assert results.read_bytes() == before
    printed = capsys.readouterr().out
    assert all(f"{score['value']:.4f}" in printed for entry in entries for score in entry["scores"])


def test_a_comparison_is_not_trained_again(place: Path) -> None:
    before, table = files_of(place / "compared"), json.loads(Path("compared/comparison.json").read_text())
    assert main(COMPARE) == 0
    after = files_of(place / "compared")
    assert after.keys() == before.keys()
    same = [path for path in before if not path.startswith("comparison")]
    assert {path: after[path] for path in same} == {path: before[path] for path in same}
    assert json.loads(after["comparison.json"])["rows"] == table["rows"]


@pytest.mark.parametrize(
    ("folder", "numbers"),
    [
        # Of the log, of the trainer's last evaluation, of a task, and of a measurement.
        ("runs/finished", ["1.635", "0.4216", "0.1667", "2.726", "learning_rate: 0.02"]),
        ("runs/kd", ["step 4 of 6", "1.779"]),
        ("compared", ["252.007", "253.578", "167.7 %", "+0.016"]),
    ],
)
def test_a_report_tells_what_a_run_left(place: Path, folder: str, numbers: list[str]) -> None:
    assert main(["report", folder, "--output", "told"]) == 0
    page = Path("told/report.md").read_text()
    assert [number for number in numbers if number not in page] == []


def test_a_run_is_ready_to_be_published(place: Path) -> None:
    assert main(["push", "runs/finished", "--repo", "org/student", "--dry_run", "--output", "pushed"]) == 0
    card = Path("pushed/README.md").read_text()
    for fact in ("`kd`", "CC0-1.0", "learning_rate: 0.02", "0.16666666666666666", "1.6775142124720983", "326"):
        assert fact in card
    assert Path("pushed/model.safetensors").read_bytes() == Path("runs/finished/model.safetensors").read_bytes()


@pytest.mark.parametrize("case", CASES, ids=[" ".join([Path(case["recipe"]).stem, *case["flags"]]) for case in CASES])
def test_a_recipe_means_what_it_meant(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)
    stages = case["values"]
    for values in stages.values():
        for name in values.get("env", {}):
            # Put back afterwards, whatever the recipe sets.
            monkeypatch.setenv(name, "")
    told = values_of(case["recipe"], case["flags"])
    assert list(told) == list(stages)
    for stage, values in stages.items():
        assert {key: told[stage].get(key, "no such key") for key in values} == values


def test_public_names_are_there() -> None:
    assert [name for name in PUBLIC if not hasattr(mmkd, name)] == []
