"""CoMD's settings, and the loss of a round."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from mmkd.methods.comd.comd_trainer import CoMDConfig, CoMDTrainer
from mmkd.methods.sft import SFTBaselineTrainer
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.stages import plan
from tests.helpers import Build, losses_of


def test_a_round_learns_the_answers_as_sft_does(build: Build, completions: Dataset) -> None:
    ours = build(CoMDTrainer, completions, trainer={"teacher": None})
    theirs = build(SFTBaselineTrainer, completions, trainer={"teacher": None})
    for trainer in (ours, theirs):
        trainer.train()
    assert losses_of(ours) == losses_of(theirs)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"ce_weight": 0.5}, "round_method: kd"),
        ({"rounds": -1}, "give 0 or more"),
        ({"new_instructions": 0}, "give 1 or more"),
        ({"hard_ratio": 1.5}, "from 0 to 1"),
        ({"max_teacher_tokens": 0}, "give 1 or more, or null"),
        ({"assessor": "jury"}, "choose one of judge"),
        ({"augmentor": "me"}, "choose one of model"),
        ({"round_method": "dho"}, "choose one of sft, kd, taid"),
        ({"train_on": "new", "augmentor": "none"}, "needs new instructions"),
        ({"round_cache": True}, "does not read"),
        ({"mutual": True, "assessor": "none"}, "whose answer is better"),
        ({"judge_temperature": -1.0}, "give 0 or more"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoMDConfig(str(tmp_path), **wrong)


def test_settings_of_a_round_may_be_a_flag(tmp_path: Any) -> None:
    assert CoMDConfig(str(tmp_path), round_settings='{"divergence": "jsd"}').round_settings == {"divergence": "jsd"}


@pytest.mark.parametrize("name", ["easy_vqa", "scienceqa_llava"])
def test_stages_of_shipped_recipes_parse(name: str, tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "trainers" / "comd" / f"{name}.yaml"
    for stage in plan(recipe_of(path, ["--output_dir", str(tmp_path)])):
        stage.recipe.write(Path(stage.recipe.place))
        run = recipe_of(stage.recipe.place).parse()
        assert run.arguments.method == {"PT": "sft", "CoMD": "comd"}[stage.name]
