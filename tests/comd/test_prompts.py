"""Prompts are files that one can edit."""

from pathlib import Path

import pytest

from mmkd.methods.comd.comd_prompts import FIELDS, Prompts


def test_braces_of_an_answer_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "augment_hard.txt").write_text('{"json": 1} about {instruction}')
    prompts = Prompts.read(tmp_path)
    assert prompts.fill("augment_hard", instruction="def f(): {answer_1}") == '{"json": 1} about def f(): {answer_1}'
    shipped = Prompts.read(None)
    assert prompts.texts["judge"] == shipped.texts["judge"]
    changed = {name for name in FIELDS if prompts.digests[name] != shipped.digests[name]}
    assert changed == {"augment_hard"}
    prompts.write(tmp_path / "run")
    assert Prompts.read(tmp_path / "run") == prompts


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("judge", "{instruction} {answer_1}", r"lacks the field \{answer_2\}"),
        ("augment_easy", "Write.", r"lacks the field \{instruction\}"),
        ("augment_hard", "{instruction} {topic}", r"unknown field \{topic\}"),
        ("juge", "{instruction}", "did you mean judge.txt"),
    ],
)
def test_prompts_that_cannot_be(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / f"{name}.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        Prompts.read(tmp_path)


def test_a_folder_without_prompts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no \.txt file"):
        Prompts.read(tmp_path / "none")
