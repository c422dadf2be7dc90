"""`mmkd compare --equal time`: all train as long as the one that takes most, whatever a step of each costs."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmkd.commands.main import main
from mmkd.errors import UserError
from mmkd.eval import whole_runs
from mmkd.eval.equal_time import longer, step_factors
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.recipe import Recipe
from mmkd.recipe.stages import plan
from mmkd.results.compared import ComparedModel
from mmkd.training.log import hours_of_steps, logs_in
from tests.test_stages import recipe as stages  # noqa: F401
from tests.trainers.test_dho import recipe as classes  # noqa: F401


def measured(hours: float | None) -> ComparedModel:
    return ComparedModel("trained", "somewhere", 1, {}, {}, 1, {"step_hours": hours})


def test_the_one_that_takes_most_trains_as_its_recipe_says() -> None:
    hours = {"cheap": 1.0, "dear": 3.0, "chosen, 1": 2.0, "chosen, 2": 1.5}
    recipes = {name: Recipe.of({"method": "sft"}, Path(f"{name}.yaml")) for name in hours}
    asked = {
        "cheap": [recipes["cheap"]],
        "dear": [recipes["dear"]],
        "chosen": [recipes["chosen, 1"], recipes["chosen, 2"]],
    }
    of_recipe = {recipe.place: hours[name] for name, recipe in recipes.items()}
    factors = step_factors(asked, lambda name, recipe: measured(of_recipe[recipe.place]))
    assert factors == {"cheap": [3.0], "dear": [1.0], "chosen": [1.5, 2.0]}
    with pytest.raises(UserError, match="cheap was trained by a version that did not measure its steps"):
        step_factors(asked, lambda name, recipe: measured(None))


def test_each_stage_gets_as_many_times_its_own_steps(stages: Path, tmp_path: Path) -> None:  # noqa: F811
    written = yaml.safe_load(stages.read_text())
    written["stages"]["PT"]["max_steps"] = 10
    stages.write_text(yaml.safe_dump(written))
    recipe = recipe_of(str(stages), ["--stages", "PT", "SFT", "SFT", "--seed", "3"])
    scaled = longer(recipe, 1.5, tmp_path / "longer.yaml")
    before, after = ([stage.parse({}) for stage in plan(each)] for each in (recipe, scaled))
    assert [run.training.max_steps for run in after] == [round(1.5 * run.training.max_steps) for run in before]
    assert after[0].training.max_steps == 15
    assert {run.training.seed for run in after} == {3}
    assert longer(recipe, 1, tmp_path / "none.yaml") is recipe


def test_epochs_and_steps_of_one_training(tmp_path: Path) -> None:
    recipe = Recipe.of({"method": "sft", "student": "x", "data": "y", "num_train_epochs": 2}, tmp_path / "one.yaml")
    epochs = longer(recipe, 1.5, tmp_path / "longer.yaml")
    assert epochs.keys["num_train_epochs"] == 3
    # A flag of the command is scaled too, and does not win over what is set by time.
    flagged = longer(recipe.with_(max_steps=7), 2, tmp_path / "steps.yaml")
    assert flagged.parse().training.max_steps == 14


def test_a_comparison_at_equal_time_says_how_many_steps(
    stages: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    told: list[float | None] = []

    def hours(folder: Path) -> float:
        told.append(hours_of_steps(folder))
        return 2.0 if "DFT" in folder.name else 1.0

    monkeypatch.setattr(whole_runs, "hours_of_steps", hours)
    command = ["compare", str(stages), "--test", str(tmp_path / "rows.jsonl"), "--output", "out", "--equal", "time"]
    command += ["--schedules", "PT-SFT", "PT-DFT", "--max_questions", "3", "--max_steps", "2"]
    assert main(command) == 0
    assert all(value is not None and value > 0 for value in told)
    comparison = json.loads(Path("out/comparison.json").read_text())
    assert comparison["steps_times"] == {"PT-SFT": [1.5], "PT-DFT": [1.0]}
    steps = {}
    for row in comparison["rows"][1:]:
        parts = [Path(row["folders"][0]).parent / name for name in ("1-PT", f"2-{row['name'].partition('-')[2]}")]
        steps[row["name"]] = [max(entry["step"] for log in logs_in(part) for entry in log) for part in parts]
    assert steps == {"PT-SFT": [3, 3], "PT-DFT": [2, 2]}
    said = capsys.readouterr()
    assert "Measuring the time of a step: PT-SFT." in said.err
    assert "those of the recipes times: PT-SFT 1.50, PT-DFT 1.00." in " ".join(said.out.split())
    # Again: nothing is measured or trained.
    assert main(command) == 0
    assert "Measuring the time" not in capsys.readouterr().err


def test_classes_and_rounds_are_refused(classes: Any, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    assert main(["compare", str(classes), "--equal", "time"]) == 2
    assert "--equal time is for recipes of one training or of stages" in capsys.readouterr().err
