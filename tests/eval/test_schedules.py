"""Schedules on the command line of `mmkd compare`: which stages a key is for, and what values can be written."""

from pathlib import Path

import pytest
import yaml

from mmkd.errors import UserError
from mmkd.eval.baselines import comparison_of
from mmkd.eval.compare import Asked
from mmkd.eval.compare_checks import check_recipe, check_together
from mmkd.eval.schedules import scheduled
from mmkd.recipe.flags import recipe_of
from mmkd.training.method import METHODS


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    written = {
        "method": "llava_kd",
        "student_init": "llava",
        "student": "small",
        "student_vision_tower": "small_tower",
        "output_dir": "run",
        "stages": {
            "VT": {"method": "tower_kd", "teacher": "tower", "data": "captions"},
            "DPT": {"teacher": "large", "data": "captions"},
            "SFT": {"method": "sft", "teacher": None, "data": "questions"},
            "DFT": {"teacher": "large", "data": "questions"},
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(written, sort_keys=False))
    return str(path)


def test_a_key_is_for_the_stages_whose_method_has_it(recipe: str, tmp_path: Path) -> None:
    text = "VT-DPT-SFT-DFT:visual_tokens=hungarian,learning_rate=0.1,VT.features=[mse, cosine],DFT.beta=0"
    stages = scheduled(recipe_of(recipe, []), [text], tmp_path)[text].stages
    assert {name: own.get("visual_tokens") for name, own in stages.items() if name != "SFT"} == {
        "VT": None,
        "DPT": "hungarian",
        "DFT": "hungarian",
    }
    # Every stage that distils has a learning rate.
    assert [name for name, own in stages.items() if own.get("learning_rate") == 0.1] == ["VT", "DPT", "DFT"]
    assert stages["VT"]["features"] == ["mse", "cosine"]
    assert [own.get("beta") for own in stages.values()] == [None, None, None, 0]
    mapping = "DPT-DFT:switch={weight: 2, of: [1, 2]},beta=0"
    assert scheduled(recipe_of(recipe, []), [mapping], tmp_path)[mapping].stages["DFT"]["switch"] == {
        "weight": 2,
        "of": [1, 2],
    }


def test_what_is_no_setting_is_refused(recipe: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'beta' is no setting"):
        scheduled(recipe_of(recipe, []), ["DPT-DFT:beta"], tmp_path)


def test_a_stage_of_the_tower_alone_does_not_decide_how_students_are_measured(recipe: str) -> None:
    whole, plain = (recipe_of(recipe, ["--stages", *names]) for names in (("VT", "DPT", "DFT"), ("VT", "SFT")))
    assert comparison_of(whole) is METHODS["llava_kd"].comparison
    check_recipe(whole)
    check_together([whole, recipe_of(recipe, ["--stages", "SFT"])], Asked(), comparison_of(whole))
    assert comparison_of(plain) is METHODS["sft"].comparison
    with pytest.raises(UserError, match="cannot be compared in stages"):
        check_recipe(recipe_of(recipe, ["--stages", "VT"]))
