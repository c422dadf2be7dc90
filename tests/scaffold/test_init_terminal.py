"""The dialogue of `mmkd init` as somebody at a terminal of 80 columns has it."""

import sys
from pathlib import Path

import pytest

from mmkd.recipe.recipe import Recipe

if sys.platform == "win32":
    pytest.skip("Windows has no pseudo-terminals", allow_module_level=True)

from tests.scaffold.played import Played

LEFT, BACKSPACE, CONTROL_C, CONTROL_D = "\x1b[D", "\x7f", "\x03", "\x04"


@pytest.mark.parametrize("key", [CONTROL_C, CONTROL_D])
def test_an_interruption_writes_nothing(workplace: Path, key: str) -> None:
    before = sorted(workplace.rglob("*"))
    with Played(workplace, "init") as terminal:
        terminal.answer("Your data?", "cha")
        terminal.wait("> cha")
        terminal.type(key if key == CONTROL_C else 3 * BACKSPACE + key)
        assert terminal.end() == 130
        assert "Interrupted. Nothing was written." in terminal.text
        assert "goes on from there" not in terminal.text
    assert sorted(workplace.rglob("*")) == before


def test_a_dialogue(workplace: Path, models: dict[str, Path]) -> None:
    """With a typing error, an answer that cannot be, suggestions that are taken, and keys that edit."""
    with Played(workplace, "init") as terminal:
        terminal.answer("Your data?", "chatz.jsonl\r")
        # chas.jsonl, and back to where the t belongs; the prompt stays through it all.
        terminal.answer("no file, folder or data recipe at", "chaz" + BACKSPACE + "s.jsonl" + 7 * LEFT + "t")
        terminal.wait("> chats.jsonl")
        assert terminal.line == "> chats.jsonl"
        terminal.type("\r")
        terminal.wait("chats.jsonl: conversations (24 train rows).")
        terminal.answer("[text] >", "8\r")
        terminal.answer("--task '8' is none of text, vlm,", "1\r")
        # Nothing is deleted where nothing was typed.
        terminal.answer("[none] >", 5 * BACKSPACE + "\r")
        terminal.answer("The teacher?", f"{models['teacher']}\r")
        terminal.answer("The student?", "\r")
        terminal.answer("3 layers does the student keep?", "2\r")
        terminal.answer("The file of the recipe?", "\r")
        assert terminal.end() == 0
        text = terminal.text
    for line in ("[none] >", "Wrote mine.yaml. It fits a CPU", "Sound: 0 problems", "mmkd-train mine.yaml # trains"):
        assert line in text
    assert "held out for evaluation" in text
    assert text.count("held out for evaluation") == 1
    keys = Recipe.read(workplace / "mine.yaml").keys
    assert (keys["student_init"], keys["student_layers"], keys["method"]) == ("prune", 2, "kd")
