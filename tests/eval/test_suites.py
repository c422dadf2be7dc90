"""The suites and tasks that ship: well formed, known to their harness, and what is wrong with others."""

import json

import pytest

from mmkd.eval.suites import SuiteTask, load_suite, suite_names
from mmkd.eval.tasks import Tasks
from mmkd.prepare.eval_data import humaneval_rows, mmlu_rows
from mmkd.prepare.preparations import PREPARATIONS
from mmkd.shipped import recipe_root


def test_every_shipped_suite_loads_and_says_what_it_is():
    assert {"offline", "open_llm", "math", "vlm"} <= set(suite_names())
    for name in suite_names():
        suite = load_suite(name)
        assert suite.name == name
        assert suite.description
        assert all(task.metric for task in suite.tasks)


def test_lm_eval_knows_every_task_of_the_suites():
    names = [task.task for name in suite_names() for task in load_suite(name).tasks if task.harness == "lm-eval"]
    known = Tasks(names)
    assert all(known.matching(name) == [name] for name in names)


def test_every_shipped_task_is_in_a_folder_of_its_name_and_says_how_its_data_is_made():
    folders = sorted(path for path in (recipe_root("eval") / "tasks").iterdir() if path.name != "__pycache__")
    known = Tasks([folder.name for folder in folders])
    for folder in folders:
        config = known.manager.task_index[folder.name].cfg
        command, action, name = config["metadata"]["prepare"].split()
        assert (command, action) == ("mmkd", "prepare")
        assert name in PREPARATIONS
        assert config["metadata"]["license"]


def test_a_suite_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("tasks: [arc_easy, {task: gsm8k, num_fewshot: 3}]")
    assert load_suite(str(path)).tasks == (SuiteTask("arc_easy"), SuiteTask("gsm8k", num_fewshot=3))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: []", "it must list tasks"),
        ("[a]", "it must list tasks"),
        (
            "tasks: [{task: a, fewshot: 3}]",
            "sets 'fewshot', which a SuiteTask does not have. The nearest: num_fewshot",
        ),
        ("tasks: [a]\nname_: b", "The nearest: name"),
        ("tasks: [{name: a}]", "is no task"),
        ("tasks: [{task: a, harness: helm}]", "use lm-eval or lmms-eval"),
        ("tasks: [{task: a, needs: sound}]", "which is none of vision"),
    ],
)
def test_bad_suites(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        load_suite(str(path))


def test_humaneval_rows_hold_the_problems_own_body_once():
    problems = [
        {"task_id": f"HumanEval/{i}", "prompt": f"def f{i}():\n", "canonical_solution": f"    return {i}\n"}
        for i in range(9)
    ]
    rows = list(humaneval_rows(problems))
    assert [row["bodies"][row["answer"]] for row in rows] == [one["canonical_solution"] for one in problems]
    assert all(len(set(row["bodies"])) == 4 for row in rows)
    assert rows == list(humaneval_rows(problems))
    assert len({row["answer"] for row in rows}) > 1


def test_mmlu_rows_are_the_questions_of_the_prompts():
    prompt = (
        "The following are multiple choice questions (with answers) about x.\n\nQ: Who?\n(A) a (B) b c (C) d (D) e.\n"
        "A: Let's think step by step. It is b. The answer is (B).\n\nQ: No choices\nA: The answer is (E)."
    )
    (row,) = mmlu_rows({"x": prompt})
    assert json.loads(json.dumps(row)) == {
        "subject": "x",
        "question": "Who?",
        "choices": ["a", "b c", "d", "e."],
        "answer": 1,
    }
