"""What is said before anything heavy is imported: the first line, and mistakes that a recipe's words show."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mmkd.errors import UserError
from mmkd.recipe.first_look import first_look, keys_of
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.key_parser import parser_of
from mmkd.shipped import list_recipes
from mmkd.training.method import METHODS
from tests.helpers import environment

HEAVY = ("torch", "transformers", "trl", "accelerate", "peft")

PROBE = f"""
import sys
from mmkd.commands import train_command
from mmkd.commands.main import main
import mmkd.recipe.first_look as look
first = look.first_look

def stop(*words, **settings):
    print(first(*words, **settings))
    raise KeyboardInterrupt

look.first_look = stop
main(sys.argv[1:])
print("heavy:", [name for name in {HEAVY} if name in sys.modules])
"""


def probe(*words: str) -> list[str]:
    """The lines of a process that ends where the heavy imports would begin."""
    done = subprocess.run([sys.executable, "-c", PROBE, *words], capture_output=True, text=True, env=environment())
    return [*done.stdout.splitlines(), *done.stderr.splitlines()]


@pytest.mark.parametrize("command", ["train", "doctor", "plan"])
def test_the_first_line_waits_for_nothing_heavy(command: str) -> None:
    lines = probe(command, "kd/quickstart", "--output_dir", "runs/x")
    teacher = ".cache/mmkd/SmolLM2-135M-Instruct"
    made = "a student made of the teacher (student_init: prune)"
    assert lines[0] == f"kd: {teacher} teaches {made}; data python_docs; output_dir runs/x"
    assert "heavy: []" in lines


@pytest.mark.parametrize(
    "words, reason",
    [
        (["kd/quickstrt"], "is neither a file nor a recipe that ships"),
        (
            ["kd/quickstart", "--learning_rat", "1"],
            "--learning_rat is no flag of method kd. Did you mean 'learning_rate'",
        ),
        (["kd/quickstart", "--data", "./missing.jsonl"], "missing.jsonl"),
    ],
)
def test_a_mistake_in_words_waits_for_nothing_heavy(words: list[str], reason: str) -> None:
    lines = probe("train", *words)
    assert any(line.startswith("mmkd: ") and reason in line for line in lines), lines
    assert "heavy: []" in lines


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_passes(name: str) -> None:
    assert "; data " in first_look(name, [])


@pytest.mark.parametrize("method", ["sft", "kd", "taid", "alm", "llava_kd", "comd", "dho"])
def test_keys_are_those_of_the_parser(method: str) -> None:
    """An editor's schema that is older than the fields would refuse keys that there are."""
    known = keys_of(method)
    assert known is not None
    assert known == {*parser_of(method).names, "stages", "schedule", "env", "accelerate_config"}
    assert keys_of("somebodys") is None
    assert method in METHODS


def test_a_refusal_is_that_of_the_parser(tmp_path: Path) -> None:
    """The same sentence, whoever finds it."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"method": "kd", "data": "python_docs", "student": "s", "temprature": 2}))
    said: list[str] = []
    for look in (lambda: first_look(str(path), []), lambda: recipe_of(path).parse()):
        with pytest.raises(UserError) as refused:
            look()
        said.append(str(refused.value))
    assert said[0] == said[1]


def test_what_is_not_sure_passes(tmp_path: Path) -> None:
    """Flags of `accelerate launch`, negated and JSON ones, globs, and keys of stages are the parser's to judge."""
    for flags in (
        ["--accelerate_config", "ddp", "--num_processes", "2"],
        ["--no_packing"],
        ["--data", "rows/*.jsonl"],
        ["--data", "owner/name"],
        ["--lora-r=4"],
        [],
    ):
        assert first_look("kd/quickstart", flags)
