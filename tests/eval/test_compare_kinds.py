"""`mmkd compare` of recipes in stages, in rounds and of classes: baselines, controls, choices, restarts."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmkd.commands import train as training
from mmkd.commands.main import main
from mmkd.errors import UserError
from mmkd.eval import trainings
from mmkd.eval.asked_questions import Questions
from mmkd.eval.baselines import make_baseline, schedule_of
from mmkd.eval.compare import chosen
from mmkd.methods.dho.class_comparison import METRICS
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.stages import plan
from mmkd.results.compared import ComparedModel
from tests.comd.chat_server import chat_server
from tests.comd.conftest import recipe as rounds  # noqa: F401
from tests.test_stages import recipe as stages  # noqa: F401
from tests.trainers.test_dho import recipe as classes  # noqa: F401

pytestmark = pytest.mark.usefixtures("apart")


@pytest.fixture
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def compared(output: str = "out") -> dict[str, Any]:
    return json.loads(Path(output, "comparison.json").read_text())


def rows_of(comparison: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in comparison["rows"]}


def test_the_baseline_of_stages_is_the_same_stages_without_a_teacher(stages: Path, tmp_path: Path) -> None:  # noqa: F811
    recipe = recipe_of(str(stages), ["--max_steps", "3"])
    baseline = make_baseline(recipe, tmp_path / "baseline.yaml", tmp_path / "student")
    assert schedule_of(baseline) == ["DPT", "SFT", "SFT"]
    for ours, theirs in zip(plan(baseline), plan(recipe), strict=True):
        keys, given = ours.parse({}).recipe.keys, theirs.recipe.keys
        assert keys["method"] == "sft"
        assert keys["max_steps"] == 3
        assert keys["trainable"] == given["trainable"]
        assert "teacher" not in keys
        assert "beta" not in keys
    # A stage that is one of the recipe's own takes its name, and is trained once for both.
    written = yaml.safe_load(stages.read_text())
    written["stages"]["PT"]["learning_rate"] = 1e-2
    stages.write_text(yaml.safe_dump(written))
    recipe = recipe_of(str(stages), [])
    baseline = make_baseline(recipe, tmp_path / "baseline.yaml", tmp_path / "student")
    assert schedule_of(baseline) == ["PT", "SFT", "SFT"]
    first = recipe.with_(schedule=["PT"])
    assert plan(baseline)[0].identity == plan(first)[0].identity


@pytest.mark.parametrize(
    "keys",
    [
        {"teacher": "t", "on_policy_fraction": 1.0, "reward": "rewards:short", "reward_weight": 0.5},
        {"teacher": "t", "on_policy_fraction": 0.5, "rollouts": "interleaved", "rollout_rows": "add"},
        {"teacher_server": ["http://x"], "teacher_view": {"template": "{prompt}!"}, "privileged_dropout": 0.5},
        {"method": "alm", "teacher": "self", "self_teacher": "live", "teacher_view": {"template": "{prompt}!"}},
        {"method": "alm", "teacher": "t", "teacher_view": {"template": "{prompt}!"}, "privileged_dropout": 0.5},
    ],
)
def test_a_baseline_has_no_keys_of_what_it_does_not_have(keys: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"method": "kd", "student": "s", "data": "rows", "output_dir": "o", **keys}))
    training: Any = (
        make_baseline(recipe_of(str(path), []), tmp_path / "baseline.yaml", tmp_path / "o").parse().training
    )
    assert training.reward is None
    assert training.rollouts == "student"
    if keys.get("teacher") != "t" or keys.get("method") == "alm":
        assert (training.view, training.privileged_dropout, training.self_teacher) == (None, 0, None)


def test_schedules_of_a_recipe_in_stages(
    stages: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["compare", str(stages), "--test", str(tmp_path / "rows.jsonl"), "--output", "out", "--max_questions"]
    command += ["5", "--schedules", "PT-SFT", "PT-DFT", "PT-DFT:beta=0.1", "--seeds", "0", "1"]
    assert main(command) == 0
    found = compared()
    rows = rows_of(found)
    assert {name: row["role"] for name, row in rows.items()} == {
        "teacher": "teacher",
        "PT-SFT": "baseline",
        "PT-DFT": "student",
        "PT-DFT:beta=0.1": "student",
    }
    assert list(rows) == ["teacher", "PT-SFT", "PT-DFT", "PT-DFT:beta=0.1"]
    assert found["measured_on"] == f"5 questions of {tmp_path / 'rows.jsonl'}"
    assert rows["PT-SFT"]["tokens"] == rows["PT-DFT"]["tokens"]
    # The answers are of more than a few words.
    gain = rows["PT-DFT"]["gain_over_sft"]["rouge_l"]
    assert gain["low"] <= gain["gain"] <= gain["high"]
    assert len(found["verdicts"]) == 2
    # PT is trained once per seed, by the first schedule that has it.
    trained = [path for path in Path("out").glob("*/1-PT") if not path.is_symlink()]
    assert len(trained) == 2
    said = capsys.readouterr()
    assert "PT-SFT, seed 0: training 1 of 6\n" in said.err
    assert "PT-SFT, seed 0: ROUGE-L of answers " in said.err
    assert "PT-DFT:beta=0.1, seed 1: training 6 of 6, about " in said.err
    assert found["verdicts"][0] in said.out
    assert Path("out/report.html").is_file()

    # Again: nothing is trained. Asked other questions, nothing is trained either.
    monkeypatch.setattr(training, "build_trainer", None)
    assert main(command) == 0
    assert "All 6 trainings are finished already" in capsys.readouterr().err
    assert compared()["rows"] == found["rows"]
    command[command.index("5")] = "4"
    assert main(command) == 0
    assert compared()["measured_on"].startswith("4 questions")


def test_a_comparison_of_stages_goes_on(stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    command = ["compare", str(stages), "--test", str(tmp_path / "rows.jsonl"), "--output", "out"]
    command += ["--schedules", "PT-SFT", "--baseline", "none"]
    build, built = training.build_trainer, []

    def fails_once(run: Any) -> Any:
        built.append(run.training.output_dir)
        if len(built) == 2:
            raise KeyboardInterrupt
        return build(run)

    monkeypatch.setattr(training, "build_trainer", fails_once)
    assert main(command) == 130
    assert main(command) == 0
    assert [Path(folder).name for folder in built] == ["1-PT", "2-SFT", "2-SFT"]
    assert rows_of(compared())["PT-SFT"]["cost"]["seconds"] > 0


def test_rounds_beside_sft_of_as_many_updates_and_a_control(rounds: Any, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    with chat_server() as server:
        path = rounds(teacher_server=[server.url])
        assert main(["compare", str(path), "--output", "out", "--controls", "in_rounds"]) == 0
    rows = rows_of(compared())
    assert {name: row["role"] for name, row in rows.items()} == {
        "sft": "baseline",
        "in_rounds": "control",
        "comd, recipe": "student",
    }
    # Two rounds of two updates: the third had no new answers.
    assert yaml.safe_load(Path("out/sft-baseline-seed0.yaml").read_text())["max_steps"] == 4
    control = yaml.safe_load(Path("out/controls/in_rounds-0-seed0.yaml").read_text())
    assert (control["assessor"], control["augmentor"], control["max_train_rows"]) == ("none", "none", 16)
    assert list(rows["comd, recipe"]["further"]) == ["round 0", "round 1"]
    assert rows["comd, recipe"]["cost"]["teacher_tokens"] > 0 == rows["sft"]["cost"]["teacher_tokens"]
    said = capsys.readouterr()
    assert "round 1" in said.out
    assert "finished already" not in said.err
    assert Path("out/rounds.png").is_file()


def test_classes_beside_labels_alone(
    classes: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["compare", str(classes), "--seeds", "0", "1", "--output", "out", "--controls", "kd", "single_head"]
    assert main([*command, "--max_steps", "3", "--logging_steps", "1"]) == 0
    found = compared()
    rows = rows_of(found)
    assert [row["role"] for row in found["rows"]] == ["teacher", "baseline", "control", "control", "student"]
    assert list(rows) == ["teacher", "labels only", "kd", "single_head", "dho, run"]
    assert found["measured_on"] == "12 test rows"
    student = rows["dho, run"]
    assert {"accuracy_few", "ce_head_accuracy", "alpha", "gradient_cosine"} <= set(student["further"])
    assert set(student["gain_over_sft"]) == {"accuracy"}
    assert "labels only" in found["verdicts"][0]
    assert "rows seen" in capsys.readouterr().out
    assert Path("out/gradient_conflict.png").is_file()
    seeds = [json.loads((Path(folder) / "run.json").read_text())["keys"] for folder in student["folders"]]
    assert [(keys["seed"], keys["label_seed"]) for keys in seeds] == [(0, 0), (1, 1)]
    # The teacher is asked about the training rows once for all.
    assert len(list(Path("out").glob("teacher_logits-*"))) == 1
    monkeypatch.setattr(trainings.Trainings, "_measure", None)
    assert main([*command, "--max_steps", "3", "--logging_steps", "1"]) == 0


def test_validation_chooses_among_candidates_and_the_test_does_not() -> None:
    def model(accuracy: float, validation: float, few: float) -> ComparedModel:
        metrics = {"accuracy": accuracy, "validation": validation, "validation_few": few}
        metrics |= {"accuracy_few": accuracy, "accuracy_fixed": accuracy}
        return ComparedModel("trained", str(accuracy), 1, metrics, {})

    best = chosen([model(0.9, 0.1, 0.2), model(0.5, 0.6, 0.2), model(0.7, 0.6, 0.3)], 1, METRICS)
    assert best.folder == "0.5"
    assert (best.metrics["accuracy"], best.metrics["accuracy_few"], best.metrics["accuracy_fixed"]) == (0.5, 0.7, 0.5)


def test_questions_are_rows_with_answers(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    rows = [{"question": "a b", "answer": answer} for answer in ("yes", "no", "a cat")]
    path.write_text("\n".join(map(json.dumps, rows)))
    questions = Questions.in_file(path, None)
    assert questions.answers == ["yes", "no", "a cat"]
    assert questions.source == f"3 questions of {path}"
    assert Questions.in_file(path, 2).key != questions.key
    table = tmp_path / "questions.csv"
    table.write_text("question,answer\na b,yes\na b,no\na b,a cat\n")
    assert Questions.in_file(table, None).answers == questions.answers
    with pytest.raises(UserError, match="read from JSON and CSV"):
        Questions.in_file(path.rename(tmp_path / "questions.xyz"), None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--test", "missing.jsonl"], "There is no file missing.jsonl"),
        ([], "holds no rows out"),
        (["--schedules", "PT-XFT"], "did you mean"),
        (["--schedules", "PT-DFT:beta"], "is no setting"),
        (["--test", "rows.jsonl", "--controls", "kd"], "There is no control 'kd'"),
        (["--test", "rows.jsonl", "--judge", "recipe.yaml"], "Leave --judge out"),
    ],
)
def test_what_a_comparison_of_stages_cannot_be(
    stages: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    assert main(["compare", str(stages), *flags]) == 2
    assert message in capsys.readouterr().err


def test_models_that_write_and_models_of_classes_are_not_compared(
    stages: Path,  # noqa: F811
    classes: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["compare", str(stages), str(classes)]) == 2
    assert "predict classes and tokens" in capsys.readouterr().err
    assert main(["compare", str(classes), "--test", "rows.jsonl"]) == 2
    assert "test split" in capsys.readouterr().err
