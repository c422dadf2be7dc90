"""`mmkd init` without a terminal: a recipe for every task, which doctor finds sound and which trains."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmkd.commands.main import main
from mmkd.recipe.recipe import Recipe
from tests.scaffold.conftest import write_rows
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


@pytest.mark.parametrize("task", [task for task in CASES if task not in ("served-teacher", "comd")])
def test_the_recipe_of_a_task_is_sound_and_trains(task: str, workplace: Path, models: dict[str, Path], capsys) -> None:
    assert main(flags_of(task, models)) == 0, capsys.readouterr()
    shown = capsys.readouterr().out
    assert "Sound: 0 problems" in shown
    keys = yaml.safe_load(Path("mine.yaml").read_text())
    assert keys["method"] == CASES[task][3]
    assert main(["train", "mine.yaml", *SHORT]) == 0
    assert list(Path("runs/mine").rglob("*.safetensors"))


class Tokenizing(FakeVLLM):
    """A server that has the teacher's tokenizer."""

    tokenizer: Any = None

    def respond(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path == "/tokenize":
            self.tokens = self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
        return super().respond(path, body)


def test_a_served_teacher(workplace: Path, models: dict[str, Path], tokenizer: Any) -> None:
    settings = {"vocab_size": len(tokenizer), "cap": 64, "max_model_len": 256, "root": str(models["teacher"])}
    with fake_vllm(Tokenizing, **settings) as server:
        server.tokenizer = tokenizer
        assert main([*flags_of("served-teacher", models), "--server", server.url]) == 0
        assert main(["train", "mine.yaml", *SHORT]) == 0
        assert len(server.requests) > 2
    assert Recipe.read("mine.yaml").keys["teacher_server"] == [server.url]


def test_rounds(workplace: Path, models: dict[str, Path], capsys: Any) -> None:
    assert main(flags_of("comd", models)) == 0
    assert Recipe.read("mine.yaml").keys["assessor"] == "likelihood"
    assert "assessor likelihood, augmentor model; rounds 0 to 2" in capsys.readouterr().out
    # A random teacher ends an answer by chance only.
    rambling = ["--answer_temperature", "1", "--answer_max_new_tokens", "150", "--max_length", "256", "--rounds", "0"]
    assert main(["train", "mine.yaml", *SHORT, *rambling]) == 0
    assert (Path("runs/mine") / "model.safetensors").is_file()


def test_rounds_on_prompts_alone(workplace: Path, models: dict[str, Path], capsys: Any) -> None:
    asked = [json.loads(line)["prompt"] for line in Path("prompts.jsonl").read_text().splitlines()]
    write_rows(Path("prompts.jsonl"), [{"prompt": [{"role": "user", "content": text}]} for text in asked])
    assert main([*flags_of("comd", models), "--data", "prompts.jsonl"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "The rows are prompts only. The checks assume answers of" in shown
    assert "Sound: 0 problems" in shown
    keys = Recipe.read("mine.yaml").keys
    assert "held_out_metric" not in keys
    assert "eval_strategy" not in keys
    assert keys["answer_max_new_tokens"] > 64, "The model's 256 tokens have room for more than half a short prompt."
