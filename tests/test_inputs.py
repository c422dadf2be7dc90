"""Inputs of users: `mmkd doctor` is silent about sound ones and names what is wrong with others, as training does."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mmkd.preflight.doctor import examine
from mmkd.preflight.facts import Finding
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.run import build_trainer
from tests.inputs import COUNT, FAULTY, SOUND, Input
from tests.vlms import make_llava


@pytest.fixture(scope="module")
def llavas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("llavas")
    return {
        "teacher": make_llava(folder / "teacher", seed=1, layers=3, width=48),
        "student": make_llava(folder / "student"),
    }


class Place:
    """Where an input lies, with a recipe of a run on it."""

    def __init__(self, folder: Path, text: dict[str, Path], vision: dict[str, Path]):
        self.folder, self.text, self.vision = folder, text, vision

    def recipe(self, given: Input) -> str:
        given.write(self.folder)
        models = self.vision if given.vision else self.text
        keys: dict[str, Any] = {
            "method": "kd",
            "teacher": str(models["teacher"]),
            "student": str(models["student"]),
            "data": "./data.yaml",
            "output_dir": "run",
            "max_length": 256,
            "max_steps": 6,
            "bf16": False,
            "per_device_train_batch_size": 2,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            **given.run,
        }
        keys = {key: value for key, value in keys.items() if value is not None or key == "max_length"}
        (self.folder / "run.yaml").write_text(yaml.safe_dump(keys))
        return str(self.folder / "run.yaml")


@pytest.fixture
def place(tmp_path: Path, tiny: dict[str, Path], llavas: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, tiny, llavas)


def said(findings: list[Finding]) -> list[str]:
    return [f"{one.severity}, {one.name}: {one.message}" for one in findings if one.severity != "ok"]


@pytest.mark.parametrize("name", SOUND)
def test_doctor_is_silent_about_sound_inputs(place: Place, name: str) -> None:
    findings = examine(recipe_of(place.recipe(SOUND[name])).parse())
    assert said(findings) == []
    if SOUND[name].vision:
        (about,) = (one.message for one in findings if one.name == "images")
        assert about.startswith(f"{COUNT // (2 if 'without' in name else 1)} rows have 4 image tokens each")


@pytest.mark.parametrize("name", FAULTY)
def test_doctor_says_what_is_wrong_and_training_refuses_what_is_fatal(place: Place, name: str) -> None:
    recipe = place.recipe(FAULTY[name])
    findings = examine(recipe_of(recipe).parse())
    assert said(findings)
    if any(one.severity == "problem" for one in findings):
        with pytest.raises(ValueError, match=r"\S"):
            build_trainer(recipe_of(recipe).parse()).train()
