"""Refusals of combinations say why, and the table of them is made from the source."""

import ast
import pickle
from pathlib import Path
from typing import get_args

import pytest

import mmkd
from mmkd.data.images import UnreadableImage
from mmkd.errors import Because, UserError
from mmkd.recipe.arguments import RunArguments
from scripts.combinations import Refusal, refusals, table

SOURCE = Path(mmkd.__file__).parent


def test_refusals_give_each_of_the_three_reasons_and_no_other():
    assert {refusal.because for refusal in refusals()} == set(get_args(Because))


def test_a_because_that_is_no_literal_is_passed_on_from_another_error():
    given = [
        ast.unparse(keyword.value)
        for path in SOURCE.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg == "because" and not isinstance(keyword.value, ast.Constant)
    ]
    assert given
    assert all(".because" in value for value in given), given


@pytest.mark.parametrize("kind", [UserError, UnreadableImage])
def test_a_pickled_error_keeps_its_reason(kind: type[UserError]):
    error = pickle.loads(pickle.dumps(kind("a and b", because="not built")))
    assert (type(error), str(error), error.because) == (kind, "a and b", "not built")
    assert pickle.loads(pickle.dumps(kind("a is 3"))).because is None


def test_the_table_shows_the_first_sentence(tmp_path: Path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "checks.py").write_text(
        'raise UserError(f"a is {a:.2f}, and b 0.5 | more. Set a." + text, because="meaning")\n'
        'raise UserError("A bad value.")\n'
        "raise UserError(str(error), because=error.because)\n"
    )
    assert refusals(package) == [Refusal("meaning", "package/checks.py", "a is {...}, and b 0.5 | more.")]
    assert table(refusals(package)).splitlines() == [
        "| Because | File | Message |",
        "| --- | --- | --- |",
        "| meaning | `package/checks.py` | a is {...}, and b 0.5 \\| more. |",
    ]


def test_a_refused_combination_says_why_and_a_bad_value_does_not():
    with pytest.raises(UserError) as combination:
        RunArguments(method="sft", data="d", student="s", teacher_load_in_4bit=True, teacher_load_in_8bit=True)
    assert combination.value.because == "meaning"
    with pytest.raises(UserError) as value:
        RunArguments(method="sft", data="d", student="s", teachers={"a": {"teacher": "t"}})
    assert value.value.because is None
