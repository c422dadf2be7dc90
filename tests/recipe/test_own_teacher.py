"""Recipes whose student is its own teacher."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from mmkd.errors import UserError
from mmkd.preflight.doctor import examine
from mmkd.preflight.dry_run import dry_run
from mmkd.preflight.estimate import estimate_memory
from mmkd.publish.lineage import own_forms_of, teachers_of
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.recipe import Recipe
from mmkd.recipe.run import build_token_trainer
from mmkd.results.own_teacher import own_form, with_teacher_named
from mmkd.teachers.cached import CachedTeacher
from mmkd.teachers.self_teacher import SelfTeacher
from tests.teachers.caches import build_cache


def test_the_student_teaches_itself(keys: dict[str, Any]) -> None:
    run = Recipe.of({**keys, "self_teacher": "ema", "ema_decay": 0.9, "ema_every": 2}, "own.yaml").parse()
    assert run.itself
    assert run.keys["teacher"] == "self"
    assert (run.arguments.teacher, run.arguments.teacher_revision) == (run.arguments.student, None)
    pinned = Recipe.of({**keys, "model_revision": "v2"}, "own.yaml").parse()
    assert pinned.arguments.teacher_revision == "v2"
    teacher = build_token_trainer(run).teacher
    assert isinstance(teacher, SelfTeacher)
    assert (teacher.form, teacher.decay, teacher.every) == ("ema", 0.9, 2)


def test_one_of_several_is_the_student(keys: dict[str, Any], tiny: dict[str, Path]) -> None:
    teachers = {"big": {"teacher": str(tiny["teacher"])}, "me": {"teacher": "self", "weight": 2}}
    keys = {key: value for key, value in keys.items() if key != "teacher"}
    run = Recipe.of({**keys, "teachers": teachers, "teacher_dtype": "float32"}, "own.yaml").parse()
    assert {name: alone.itself for name, alone in run.by_teacher().items()} == {"big": False, "me": True}
    several = build_token_trainer(run).teacher.teachers
    assert {name: type(teacher).__name__ for name, teacher in several.items()} == {
        "big": "LocalTeacher",
        "me": "SelfTeacher",
    }


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"teacher": "someone", "self_teacher": "live"}, "self_teacher is live, but"),
        ({"teacher_dtype": "bfloat16"}, "teacher_dtype says how a teacher is loaded"),
        ({"teacher_cache": "cache", "self_teacher": "ema"}, "teacher_cache answers for one that stays as it is"),
        ({"teacher_server": ["http://localhost:1"], "self_teacher": "live"}, "teacher_server answers for one"),
        ({"teacher_cache": "cache", "student_init": "prune", "student_layers": 1}, "makes another one of it"),
        ({"student": None, "student_init": "prune", "student_layers": 1}, "set `student`"),
        ({"method": "comd"}, "teacher: self is for kd"),
    ],
)
def test_what_cannot_teach_itself_is_refused(keys: dict[str, Any], more: dict[str, Any], message: str) -> None:
    keys = {key: value for key, value in {**keys, **more}.items() if value is not None}
    with pytest.raises(UserError, match=message):
        Recipe.of(keys, "own.yaml").parse()


def test_doctor_says_who_teaches_and_when_nothing_is_learnt(keys: dict[str, Any]) -> None:
    plain, mixed = (Recipe.of({**keys, **more}, "own.yaml").parse() for more in ({}, {"ce_weight": 0.5}))
    said = {(finding.severity, finding.message) for finding in examine(plain) if finding.name == "teacher"}
    assert ("ok", "The student is its own teacher, as it was before training.") in said
    assert [severity for severity, message in said if "nothing is learnt" in message] == ["warning"]
    assert not any("nothing is learnt" in finding.message for finding in examine(mixed))
    assert not [finding for finding in examine(mixed) if finding.severity == "problem"]


def test_memory_is_that_of_what_is_kept(keys: dict[str, Any]) -> None:
    def teacher_bytes(**more: Any) -> float:
        return estimate_memory(Recipe.of({**keys, **more}, "own.yaml").parse()).get("teacher weights", 0.0)

    whole = teacher_bytes()
    assert whole == estimate_memory(Recipe.of(keys, "own.yaml").parse())["gradients"]
    assert teacher_bytes(self_teacher="live") == 0
    assert teacher_bytes(use_peft=True) == 0
    adapter = teacher_bytes(use_peft=True, self_teacher="ema", lora_r=2)
    assert 0 < adapter < whole / 4
    # An average of bf16 weights is in float32.
    assert teacher_bytes(dtype="bfloat16", self_teacher="ema") == 2 * teacher_bytes(dtype="bfloat16") == whole


def test_a_dry_run_says_what_is_kept(keys: dict[str, Any], tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    dry_run(Recipe.of(keys, "own.yaml").parse(), console)
    assert "the student before training; keeps a copy of the" in console.export_text()


def test_a_cache_of_the_student_is_read_as_its_own_teacher(keys: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    own = {**keys, "teacher_cache": str(tmp_path / "cache"), "self_teacher": "base", "logging_steps": 1}
    recipe.write_text(yaml.safe_dump(own))
    build_cache(recipe)
    trainer = build_token_trainer(recipe_of(recipe, ["--save_strategy", "no"]).parse())
    assert isinstance(trainer.teacher, CachedTeacher)
    assert trainer.teacher.cache.manifest.identity["teacher"]["name"] == keys["student"]
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-3)


def test_a_card_names_a_student_that_taught_itself(keys: dict[str, Any]) -> None:
    trainings = [{"keys": {**keys, "self_teacher": "ema"}}]
    assert teachers_of(trainings) == []
    assert own_forms_of(trainings) == ["the student itself, averaged over the steps"]
    named = with_teacher_named({**keys, "model_revision": "v2"})
    assert (named["teacher"], named["teacher_revision"]) == (keys["student"], "v2")
    plain = {**keys, "teacher": "ORG/BIG"}
    assert with_teacher_named(plain) == plain
    assert own_form(plain) is None
