"""Final answers: how they are read and compared, beside lm-eval's own filters and exact_match on its gold rows."""

import json
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmkd.errors import UserError
from mmkd.generation.final_answers import final_letter, final_number
from mmkd.generation.thoughts import thought_of
from mmkd.generation.verifiers import Verifier, verifier_named


@pytest.mark.parametrize(
    "text, number",
    [
        (r"The answer is \boxed{\frac{3}{4}}.", Fraction(3, 4)),
        ("First 5, then 7 - 5 = 2.\n#### 1,234", 1234),
        ("The answer is 5 apples, which is 10%.", 5),
        ("so 5-3 = 2", 2),
        ("She has $12.50 left.", Fraction(25, 2)),
        ("x = -3/4", Fraction(-3, 4)),
        ("\u22124", -4),
        (r"\boxed{1{,}000}", 1000),
        (r"\boxed{2} no, \boxed{3}", 3),
        (r"it is \boxed{4", 4),
        ("3/0", None),
        ("I do not know.", None),
    ],
)
def test_the_number_that_a_text_ends_in(text: str, number: Any) -> None:
    assert final_number(text) == number


@pytest.mark.parametrize(
    "text, letter",
    [
        ("The answer is (B).", "B"),
        ("B", "B"),
        ("(A) is wrong, so (C)", "C"),
        ("**Answer: D**", "D"),
        (r"\boxed{\text{B}}", "B"),
        ("B. Paris", "B"),
        ("Because of it.\nC", "C"),
        ("The answer is a cat", None),
        ("I think so", None),
    ],
)
def test_the_letter_that_a_text_chooses(text: str, letter: str | None) -> None:
    assert final_letter(text) == letter


def lm_eval_tasks() -> Path:
    spec = find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "tasks"


def extracted(pattern: str, texts: list[str], group: int = 0) -> list[str]:
    from lm_eval.filters.extraction import RegexFilter

    return [
        values[0] for values in RegexFilter(pattern, group_select=group).apply([[t] for t in texts], [{}] * len(texts))
    ]


@pytest.mark.parametrize("name", ["number", "math"])
def test_gsm8k_is_scored_as_lm_eval_scores_it(name: str) -> None:
    if name == "math":
        pytest.importorskip("math_verify")
    from lm_eval.api.metrics import exact_match_fn

    task = yaml.safe_load((lm_eval_tasks() / "gsm8k" / "gsm8k-cot.yaml").read_text())
    answers = [sample["target"] for sample in task["fewshot_config"]["samples"]]
    golds = [f"They are counted.\n#### {answer.split('The answer is ')[-1].rstrip('.')}" for answer in answers]
    (metric,) = task["metric_list"]
    ways = {way["name"]: way["filter"][0] for way in task["filter_list"]}
    strict = extracted(ways["strict-match"]["regex_pattern"], answers)
    flexible = extracted(ways["flexible-extract"]["regex_pattern"], answers, -1)
    options = {key: metric[key] for key in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}
    verifier = verifier_named(name)
    for theirs in (strict, flexible):
        for answer, read in zip(answers, theirs, strict=True):
            for gold in golds:
                score = exact_match_fn(predictions=[read], references=[gold], **options)["exact_match"]
                assert verifier.rule(answer, {}, gold).right == bool(score), (answer, gold)


def test_the_letters_of_mmlu_are_those_that_lm_eval_extracts() -> None:
    folder = lm_eval_tasks() / "mmlu" / "flan_cot_fewshot"
    prompts = json.loads((folder / "_cot_prompts.json").read_text())
    template = yaml.safe_load((folder / "_mmlu_flan_cot_fewshot_template_yaml").read_text().replace("!function", ""))
    answers = [part.partition("\n\nQ:")[0] for text in prompts.values() for part in text.split("\nA:")[1:]]
    assert len(answers) > 250
    theirs = extracted(template["filter_list"][0]["filter"][0]["regex_pattern"], answers)
    ours = [final_letter(answer) for answer in answers]
    assert [f"({letter})" for letter in ours] == theirs


def test_math_compares_what_is_written_in_another_way() -> None:
    pytest.importorskip("math_verify")
    verifier = verifier_named("math")
    for gold, answer in (
        ("1/2", r"so \boxed{0.5}"),
        (r"\frac{1}{2}", r"The answer is $\frac12$."),
        ("x^2+1", r"\boxed{1+x^2}"),
        ("It is so.\n#### 72", "72"),
    ):
        assert verifier.rule(answer, {}, gold).right, (gold, answer)
    assert verifier.rule("4", {}, "3").right is False
    assert verifier.rule("I do not know", {}, "5").final is None
    answers = [verifier.final(text) for text in (r"\boxed{\frac{1}{2}}", "0.5", "nothing", "3")]
    assert verifier.classes(answers) == [0, 0, None, 3]


def test_json_is_parsed_checked_and_compared(tmp_path: Path) -> None:
    fits = {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}}
    (tmp_path / "schema.json").write_text(json.dumps(fits))
    verifier = verifier_named("json", str(tmp_path / "schema.json"))
    for text, right in (
        ('{"city": "Rome"}', True),
        ('Here it is:\n```json\n{"city": "Rome"}\n```', True),
        ('{"city": 3}', False),
        ('{"city": "Rome"', False),
        ('{"city": "Rome", "size": NaN}', False),
    ):
        assert verifier.rule(text, {}, None).right is right, text
    compared = verifier_named("json", None, "gold")
    assert compared.rule('{"a": 1, "b": [2]}', {}, '{"b": [2], "a": 1.0}').right
    assert compared.rule('{"a": true}', {}, {"a": 1}).right is False
    (tmp_path / "broken.json").write_text('{"type": 3}')
    with pytest.raises(UserError, match="is no JSON Schema that can be read"):
        verifier_named("json", str(tmp_path / "broken.json"))


def test_functions_of_the_user_are_called_with_answer_and_row(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def scored(answer, row):\n    return None if row['n'] is None else float(answer) / row['n']\n"
        "def broken(answer, row):\n    return row['gone']\n"
        "def worded(answer, row):\n    return 'yes'\n"
    )
    place = f"python:{tmp_path}/mine.py"
    verifier = verifier_named(f"{place}:scored")
    rulings = [verifier.rule("3", {"n": n}, None).right for n in (3, 4, None)]
    assert rulings == [True, False, None]
    assert verifier.facts() != verifier_named(f"{place}:broken").facts()
    for name, words in (("broken", "KeyError: 'gone'"), ("worded", "gave 'yes'"), ("absent", "has no function")):
        with pytest.raises(UserError, match=words):
            verifier_named(f"{place}:{name}").rule("3", {"n": 1}, None)


def test_a_row_without_a_right_answer_is_not_called_wrong() -> None:
    verifier: Verifier = verifier_named("number")
    assert verifier.rule("4", {}, None).right is None
    assert verifier.rule("4", {}, "nobody knows").right is None


@pytest.mark.parametrize(
    "text, opened, parts",
    [
        ("<think>\na\n</think>\n\nb", False, ("a", "b", True)),
        ("a</think>b", True, ("a", "b", True)),
        ("b", False, (None, "b", True)),
        ("<think>a", False, ("a", "", False)),
        ("a", True, ("a", "", False)),
    ],
)
def test_thoughts_and_answers_are_told_apart(text: str, opened: bool, parts: tuple[Any, ...]) -> None:
    thought = thought_of(text, opened)
    assert (thought.thoughts, thought.answer, thought.ends) == parts
