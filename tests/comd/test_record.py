"""The record: nothing is asked twice, whatever happens to the process."""

import json
from pathlib import Path

import pytest

from mmkd.generation.generator import Sampling
from mmkd.methods.comd.reply_record import Question, Record, engine_key
from tests.comd.stand_ins import Scripted

SAMPLING = Sampling(8)


def question(text: str, sample: int = 0) -> Question:
    return Question(({"role": "user", "content": text},), sample=sample)


def test_equal_questions_are_asked_once_and_known_ever_after(tmp_path: Path) -> None:
    engine = Scripted(lambda asked: str(asked.messages[0]["content"]).upper())
    record = Record(tmp_path / "record.jsonl")
    said = record.ask(engine, [question("a"), question("b"), question("a")], SAMPLING, "first")
    assert [one.text for one in said] == ["A", "B", "A"]
    assert len(engine.asked) == 2
    # Another process, another phase.
    again = Record(tmp_path / "record.jsonl")
    assert [one.text for one in again.ask(engine, [question("b"), question("c")], SAMPLING, "second")] == ["B", "C"]
    assert [one.messages[0]["content"] for one in engine.asked] == ["a", "b", "c"]
    assert (again.usage["second"].replies, again.usage["second"].asked, again.usage["second"].seconds) == (2, 1, 1.0)
    assert again.spent[engine_key(engine)] == 6


@pytest.mark.parametrize(
    "changed", [{"sampling": Sampling(9)}, {"sample": 1}, {"engine": Scripted(lambda asked: "x", "other")}]
)
def test_another_question_is_another_one(tmp_path: Path, changed: dict) -> None:
    engine = Scripted(lambda asked: "x")
    record = Record(tmp_path / "record.jsonl")
    record.ask(engine, [question("a")], SAMPLING, "phase")
    other = changed.get("engine", engine)
    record.ask(other, [question("a", changed.get("sample", 0))], changed.get("sampling", SAMPLING), "phase")
    assert len(record.known) == 2


def test_a_line_that_was_not_finished_is_asked_again(tmp_path: Path) -> None:
    path, engine = tmp_path / "record.jsonl", Scripted(lambda asked: "said")
    Record(path).ask(engine, [question("a"), question("b")], SAMPLING, "phase")
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    engine.asked.clear()
    Record(path).ask(engine, [question("a"), question("b")], SAMPLING, "phase")
    assert [one.messages[0]["content"] for one in engine.asked] == ["b"]
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 2
    path.write_bytes(b"broken\n" + content)
    with pytest.raises(ValueError, match=r"Line 1 of .* is damaged"):
        Record(path)


def test_a_process_that_dies_keeps_what_was_said(tmp_path: Path) -> None:
    def reply(asked: Question) -> str:
        if asked.messages[0]["content"] == "c":
            raise KeyboardInterrupt
        return "said"

    path = tmp_path / "record.jsonl"
    with pytest.raises(KeyboardInterrupt):
        Record(path).ask(Scripted(reply), [question(text) for text in "abcd"], SAMPLING, "phase")
    engine = Scripted(lambda asked: "said")
    Record(path).ask(engine, [question(text) for text in "abcd"], SAMPLING, "phase")
    assert [one.messages[0]["content"] for one in engine.asked] == ["c", "d"]
