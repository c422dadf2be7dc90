"""A teacher behind its own prompt that is not loaded, or one of several: as the same teacher in this process."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM

from mmkd.commands.main import main
from mmkd.errors import UserError
from mmkd.methods.kd import KDTrainer
from mmkd.preflight.facts import take_sample
from mmkd.preflight.view_checks import own_prompt
from mmkd.recipe.recipe import Recipe
from mmkd.recipe.run import build_trainer
from mmkd.teachers.hidden_server import HiddenServerTeacher
from mmkd.teachers.served_head import head_of_checkpoint
from mmkd.teachers.several import SeveralTeachers
from scripts.make_tiny_models import sentences
from tests.helpers import Build, near, steps
from tests.teachers.fake_vllm import ServedStates, fake_vllm

HINT: dict[str, Any] = {"template": "{hint} {prompt}", "columns": ["hint"]}


@pytest.fixture
def keys(tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe whose teacher reads a hint, over a file with a column of hints."""
    monkeypatch.chdir(tmp_path)
    columns = zip(sentences(12, seed=3), sentences(12, seed=4), sentences(12, seed=5), strict=True)
    rows = [{"prompt": prompt, "completion": f" {answer}", "hint": hint} for prompt, answer, hint in columns]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = {role: str(tiny[role]) for role in ("student", "teacher")}
    how = {
        "method": "kd",
        "data": "rows.jsonl",
        "teacher_view": HINT,
        "output_dir": "run",
        "max_steps": 2,
        "max_length": 96,
    }
    small = {"bf16": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-2}
    return {**models, **how, **small, "per_device_train_batch_size": 4}


def trained(keys: dict[str, Any]) -> list[float]:
    trainer: Any = build_trainer(Recipe.of(keys, "recipe.yaml").parse())
    return steps(trainer)


def test_a_cache_is_of_its_view_and_teaches_as_the_teacher_itself(keys: dict[str, Any]) -> None:
    cached = {**keys, "teacher_cache": "cache", "cache_signal": "hidden", "cache_hidden_dtype": "float32"}
    Recipe.of(cached, "cached.yaml").write(Path("cached.yaml"))
    assert main(["cache", "build", "cached.yaml"]) == 0
    expected = near(trained(keys))
    assert trained(cached) == expected
    assert trained({**cached, "packing": True}) == near(trained({**keys, "packing": True}))
    for other in ({"template": "{prompt}"}, None):
        with pytest.raises(UserError, match="teacher_view"):
            trained({**cached, "teacher_view": other})


def test_doctor_shows_both_prompts_and_says_what_is_wrong_with_a_view(keys: dict[str, Any]) -> None:
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    Path("rows.jsonl").write_text("".join(json.dumps({**row, "gap": None}) + "\n" for row in rows))

    def said(**view: Any) -> list[tuple[str, str]]:
        run = Recipe.of({**keys, "teacher_view": view}, "recipe.yaml").parse()
        return [(finding.severity, finding.message) for finding in own_prompt(run, take_sample(run))]

    ((severity, shown),) = said(**HINT)
    assert severity == "ok"
    assert any(repr(f"{row['hint']} {row['prompt']}") in shown and repr(row["prompt"]) in shown for row in rows)
    assert "reads what the student reads" in said(template="{prompt}")[1][1]
    assert "'gap' is empty in 12 of 12 rows" in said(template="{gap} {prompt}", columns=["gap"])[1][1]
    assert "can copy what it has just read" in said(template="{prompt} {answer}")[1][1]


def test_a_server_is_asked_behind_the_view(build: Build, completions: Dataset, tiny: dict[str, Path]) -> None:
    rows = completions.add_column("hint", sentences(24, seed=5))  # pyright: ignore[reportCallIssue]
    model = AutoModelForCausalLM.from_pretrained(tiny["teacher"])
    settings: dict[str, Any] = {"teacher_view": HINT, "max_steps": 2}
    local = steps(build(KDTrainer, rows, **settings))
    with fake_vllm(ServedStates, served=model, max_model_len=512) as fake:
        teacher = HiddenServerTeacher(fake.url, head_of_checkpoint(str(tiny["teacher"])))
        assert steps(build(KDTrainer, rows, trainer={"teacher": teacher}, **settings)) == near(local)


@pytest.mark.parametrize("more", [{}, {"packing": True}], ids=str)
def test_each_of_several_teachers_has_a_view(
    build: Build, routed: Dataset, tiny: dict[str, Path], more: dict[str, Any]
) -> None:
    rows = routed.add_column("hint", sentences(24, seed=5))  # pyright: ignore[reportCallIssue]
    teachers = {name: str(tiny["teacher"]) for name in ("a", "b")}

    def taught(column: str | None, **settings: Any) -> list[float]:
        teacher = SeveralTeachers(teachers, None, column, settings.pop("views", None))
        return steps(build(KDTrainer, rows, trainer={"teacher": teacher}, max_steps=2, **settings, **more))

    alone = near(steps(build(KDTrainer, rows, teacher_view=HINT, max_steps=2, **more)))
    same = {"template": "{prompt}"}
    for column in (None, "domain"):
        assert taught(column, teacher_view=HINT) == alone
        mixed = taught(column, views={"a": HINT})
        assert mixed != alone
        assert mixed == near(taught(column, teacher_view=HINT, views={"b": None}))
        assert mixed == near(taught(column, teacher_view=HINT, views={"b": same}))
