"""What a run does besides training: it evaluates once, trains only where asked, and writes no card of others."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmkd.commands.main import main
from mmkd.publish.runs import read_log
from mmkd.training.base import DistillationTrainer
from mmkd.training.progress import phase
from tests.test_cli import workplace as workplace


@pytest.fixture
def evaluations(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps after which trainers evaluate in this process, which works in the folder of `recipe.yaml`."""
    monkeypatch.chdir(workplace)
    steps: list[int] = []
    plain = DistillationTrainer.evaluate

    def counted(self: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        steps.append(self.state.global_step)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "evaluate", counted)
    return steps


def results(folder: Path = Path("run")) -> dict[str, float]:
    return json.loads((folder / "eval_results.json").read_text())


def test_the_last_step_is_evaluated_once(evaluations: list[int]) -> None:
    """By the training, whose metrics are kept as those of an evaluation after it would be."""
    assert main(["train", "recipe.yaml"]) == 0
    after = results()
    assert evaluations == [4]
    evaluations.clear()
    flags = ["--eval_strategy", "steps", "--eval_steps", "3", "--output_dir", "inside"]
    assert main(["train", "recipe.yaml", *flags]) == 0
    assert evaluations == [3, 4]
    inside = results(Path("inside"))
    clock = ("runtime", "per_second")
    assert {key: value for key, value in inside.items() if not key.endswith(clock)} == pytest.approx(
        {key: value for key, value in after.items() if not key.endswith(clock)}
    )
    assert [one["step"] for one in read_log(Path("inside")) if "eval_kl" in one] == [3, 4]


def test_the_best_student_is_evaluated_again(evaluations: list[int]) -> None:
    """The weights are those of another step than the last, which was evaluated."""
    best = ["--load_best_model_at_end", "true", "--metric_for_best_model", "eval_kl", "--greater_is_better", "true"]
    saving = ["--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "steps", "--eval_steps", "2"]
    assert main(["train", "recipe.yaml", *saving, *best]) == 0
    assert evaluations == [2, 4, 4]
    logged = {one["step"]: one["eval_kl"] for one in read_log(Path("run"))[:-1] if "eval_kl" in one}
    assert results()["eval_kl"] == pytest.approx(logged[2]) != pytest.approx(logged[4])


def test_the_end_says_what_came_out_and_what_works_next(
    evaluations: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its commands are run as they stand."""
    flags = ["--eval_on_start", "true", "--eval_strategy", "steps", "--eval_steps", "2", "--output_dir", "my run"]
    assert main(["train", "recipe.yaml", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(r"Finished: 4 steps in .* s, [\d,]+ supervised tokens\.", line) for line in lines)
    assert any(re.fullmatch(r"held-out rows +before training +now", line) for line in lines)
    assert any(re.fullmatch(r"kl +[\d.]+ +[\d.]+", line) for line in lines)
    assert "The student is in my run" in lines
    commands = [line.strip() for line in lines if line.startswith("    mmkd ")]
    assert [shlex.split(command)[1] for command in commands] == ["report", "eval", "push"]
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command


def test_an_adapter_of_a_folder_is_pushed_too(evaluations: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "recipe.yaml", "--use_peft", "true", "--max_steps", "1"]) == 0
    out = capsys.readouterr().out
    commands = [line.strip() for line in out.splitlines() if line.startswith("    mmkd ")]
    assert [shlex.split(command)[1] for command in commands] == ["report", "eval", "push"]
    assert main(shlex.split(commands[-1])[1:]) == 0


def test_a_part_of_something_larger_says_nothing_about_what_is_next(
    evaluations: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    with phase("stage 1 of 2"):
        assert main(["train", "recipe.yaml", "--max_steps", "1"]) == 0
    out = capsys.readouterr().out
    assert "The student is in run" in out
    assert "mmkd report" not in out


def test_a_run_that_does_not_train_evaluates(evaluations: list[int]) -> None:
    assert main(["train", "recipe.yaml", "--do_train", "false", "--do_eval", "true"]) == 0
    assert evaluations == [0]
    assert results()["eval_kl"] > 0
    assert not list(Path("run").glob("*.safetensors"))
    assert not Path("run/run.json").exists()


def test_a_run_that_does_not_evaluate(evaluations: list[int]) -> None:
    assert main(["train", "recipe.yaml", "--do_eval", "false", "--max_steps", "1"]) == 0
    assert evaluations == []
    assert Path("run/model.safetensors").is_file()


@pytest.mark.parametrize(
    "keys, reason",
    [
        ({"do_train": False}, "nothing would happen. Set do_eval: true"),
        ({"do_train": False, "do_eval": True, "data": "held.yaml"}, "holds no rows out"),
        ({"do_train": False, "do_eval": True, "resume_from_checkpoint": True}, "nothing to resume"),
        ({"do_train": False, "do_eval": True, "stages": {"a": {}, "b": {}}}, "consists of several trainings"),
        ({"stages": {"a": {"do_train": False}, "b": {}}}, "consists of several trainings"),
        ({"do_eval": False, "eval_strategy": "steps", "eval_steps": 1}, "eval_strategy is steps, which evaluates"),
        ({"do_predict": True}, "do_predict has no effect in a recipe"),
        ({"teacher_model_init_kwargs": {"dtype": "float32"}}, "Set teacher_dtype"),
        (
            {"push_to_hub": True, "use_peft": True, "student": "there"},
            "an adapter of there, a folder here",
        ),
        ({"include_for_metrics": ["loss"]}, "set in Python only"),
    ],
)
def test_what_would_be_ignored_is_refused(
    evaluations: list[int], keys: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("there").mkdir()
    data = yaml.safe_load(Path("words.yaml").read_text())
    del data["data_files"]["eval"], data["splits"]["eval"]
    Path("held.yaml").write_text(yaml.safe_dump(data))
    Path("bad.yaml").write_text(yaml.safe_dump({**yaml.safe_load(Path("recipe.yaml").read_text()), **keys}))
    assert main(["train", "bad.yaml"]) == 2
    assert reason in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(Path().glob("run/*"))


def test_a_run_writes_no_card_of_others(evaluations: list[int]) -> None:
    """TRL would call it a fine-tuned version of [None], with every checkpoint."""
    assert main(["train", "recipe.yaml", "--save_strategy", "steps", "--save_steps", "2"]) == 0
    assert Path("run/checkpoint-4").is_dir()
    assert not list(Path("run").rglob("README.md"))
