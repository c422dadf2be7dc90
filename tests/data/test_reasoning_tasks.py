"""Tasks of reasoning-gym: worked solutions, splits without common questions, and what counts as a right answer."""

import json
from pathlib import Path

import pytest

from mmkd.eval.tasks import Tasks
from mmkd.prepare import reasoning_tasks
from mmkd.prepare.preparations import PREPARATIONS
from mmkd.prepare.reasoning_tasks import TASKS, letters, said, sum_steps


def test_a_solution_says_each_step():
    assert sum_steps({"metadata": {"expression": "35 + 86 - 132"}}) == "35 + 86 = 121\n121 - 132 = -11"
    assert letters({"metadata": {"word": "glink"}}) == "g l i n k\nk n i l g"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("35 + 86 = 121\nAnswer: 121", "121"),
        ("The answer to the given arithmetic problem is -3.", "-3"),
        ("The final answer is: 72 - 92 = -20.", "-20"),
        ("Answer: 4\n\nNo, the answer is **5**.", "5"),
        ('The correct answer is "sixyP".', "sixyP"),
        ("The answer is:\nsixyP", "sixyP"),
        ("1 + 2 = 3", "3"),
        ("", ""),
    ],
)
def test_what_a_text_says_last_is_its_answer(text, answer):
    assert said(text) == answer


def test_rows_have_seeds_of_their_own_and_their_answers_are_right(tmp_path, monkeypatch):
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(reasoning_tasks, "SPLITS", {"test": 20, "validation": 10, "train": 60})
    written = reasoning_tasks.make_reasoning_tasks(tmp_path)
    for name in TASKS:
        splits = {}
        for split, size in reasoning_tasks.SPLITS.items():
            path = tmp_path / f"{name}_{split}.jsonl"
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            assert len(rows) == written[path] == size
            splits[split] = {row["prompt"] for row in rows}
            assert all(reasoning_tasks.score(name, row["completion"], row["answer"]) == 1 for row in rows)
            assert all(reasoning_tasks.score(name, f"Answer: {row['answer']}1", row["answer"]) == 0 for row in rows)
        assert sum(map(len, splits.values())) == len(set().union(*splits.values()))


def test_each_task_has_an_evaluation_and_files_to_prepare():
    files = PREPARATIONS["reasoning_gym"].files
    assert {Path(file).name.rpartition("_")[0] for file in files} == TASKS.keys()
    names = [f"reasoning_{name}" for name in TASKS]
    assert [Tasks([name]).matching(name) for name in names] == [[name] for name in names]
