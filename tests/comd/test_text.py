"""ROUGE-L and what counts as a word."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmkd.methods.comd.text import nearest, normalised, rouge_l, words

TEXTS = st.lists(st.sampled_from("abcd"), max_size=9)


def longest(first: list[str], second: list[str]) -> int:
    """The longest common subsequence by its definition."""
    if not first or not second:
        return 0
    if first[-1] == second[-1]:
        return 1 + longest(first[:-1], second[:-1])
    return max(longest(first[:-1], second), longest(first, second[:-1]))


@given(TEXTS, TEXTS)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(first: list[str], second: list[str]) -> None:
    common = longest(first, second)
    expected = 2 * common / (len(first) + len(second)) if common else 0.0
    assert rouge_l(first, second) == pytest.approx(expected)
    assert rouge_l(first, second) == rouge_l(second, first)


def test_rouge_l_of_lins_example() -> None:
    """Lin 2004: police kill the gunman / the gunman kill police, against police killed the gunman."""
    reference = words("Police killed the gunman.")
    assert rouge_l(words("police kill the gunman"), reference) == pytest.approx(3 / 4)
    assert rouge_l(words("the gunman kill police"), reference) == pytest.approx(2 / 4)


def test_words_of_scripts_without_spaces() -> None:
    assert words("What's 你好, Ä-1?") == ["what", "s", "你", "好", "ä", "1"]
    assert normalised("  A  Red\nShape. ") == "a red shape"


@given(TEXTS, st.lists(TEXTS, max_size=6), st.sampled_from([0.0, 0.3, 0.7]))
def test_nearest_skips_nothing_that_is_above_the_bound(text: list[str], others: list[list[str]], above: float) -> None:
    expected = next((place for place, other in enumerate(others) if rouge_l(text, other) > above), None)
    assert nearest(text, others, above) == expected
