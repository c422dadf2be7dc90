"""`mmkd init` without a terminal: a recipe for every task, which doctor finds sound and which trains."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mmkd.commands.main import main
from mmkd.recipe.recipe import Recipe
from tests.teachers.fake_vllm import FakeVLLM, fake_vllm

CASES: dict[str, tuple[str, str, str, str]] = {
    "text": ("chats.jsonl", "teacher", "student", "kd"),
    "vlm": ("vqa.json", "large_vlm", "small_vlm", "llava_kd"),
    "classify": ("classes", "clip", "vit", "dho"),
    "comd": ("chats.jsonl", "teacher", "student", "comd"),
    "other-tokenizer": ("chats.jsonl", "teacher", "other", "alm"),
    "served-teacher": ("chats.jsonl", "teacher", "student", "kd"),
    "on-policy": ("prompts.jsonl", "teacher", "student", "kd"),
}
"""Task -> data, teacher, student and the method of its recipe."""

SHORT = ["--max_steps", "2", "--save_strategy", "no", "--logging_steps", "1"]


def flags_of(task: str, models: dict[str, Path], **more: str) -> list[str]:
    data, teacher, student, _ = CASES[task]
    flags = {"data": data, "task": task, "gpu": "none", "teacher": models[teacher], "student": models[student], **more}
    return ["init", "mine.yaml", *(word for key, value in flags.items() for word in (f"--{key}", str(value)))]


@pytest.mark.parametrize("task", [task for task in CASES if task != "served-teacher"])
def test_the_recipe_of_a_task_is_sound_and_trains(task: str, workplace: Path, models: dict[str, Path], capsys) -> None:
    assert main(flags_of(task, models)) == 0, capsys.readouterr()
    shown = capsys.readouterr().out
    assert "Sound: 0 problems" in shown
    keys = yaml.safe_load(Path("mine.yaml").read_text())
    assert keys["method"] == CASES[task][3]
    short = [*SHORT, "--rounds", "0", "--answer_max_new_tokens", "8"] if task == "comd" else SHORT
    assert main(["train", "mine.yaml", *short]) == 0
    assert list(Path("runs/mine").rglob("*.safetensors"))


def test_a_served_teacher(workplace: Path, models: dict[str, Path], tokenizer: Any) -> None:
    with fake_vllm(FakeVLLM, vocab_size=len(tokenizer), cap=64, max_model_len=256) as server:
        assert main([*flags_of("served-teacher", models), "--server", server.url]) == 0
        assert main(["train", "mine.yaml", *SHORT]) == 0
        assert server.requests
    assert Recipe.read("mine.yaml").keys["teacher_server"] == [server.url]
