"""Hard and easy: Lion's own selection, and what is reported of it."""

from pathlib import Path

import numpy as np
import pytest

from mmkd.methods.comd.instructions import ImageStore
from mmkd.methods.comd.select import Score, both_orders, difficulty, split

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "COMD_lion_selection.npz")


def test_the_selection_of_lions_authors() -> None:
    pairs = zip(GOLDEN["scores_teacher_first"].tolist(), GOLDEN["scores_student_first"].tolist(), strict=True)
    scores = [both_orders(str(row), tuple(first), tuple(second)) for row, (first, second) in enumerate(pairs)]
    hard, easy = split(scores, threshold=1.0)
    assert {int(one.key) for one in hard} == set(GOLDEN["hard_idx"].tolist())
    assert {int(one.key) for one in easy} == set(GOLDEN["easy_idx"].tolist())
    assert [one.gap for one in hard] == GOLDEN["hard_diff"].tolist()
    assert [one.gap for one in easy] == GOLDEN["easy_diff"].tolist()
    assert [one.teacher for one in hard] == GOLDEN["hard_teacher"].tolist()


@pytest.mark.parametrize("first, second", [((9.0, 3.0), (4.0, 8.0)), ((1.0, 10.0), (5.0, 5.0))])
def test_swapping_the_two_answers_negates_the_gap(first: tuple[float, float], second: tuple[float, float]) -> None:
    one, other = both_orders("key", first, second), both_orders("key", second, first)
    assert (one.teacher, one.student) == (other.student, other.teacher)
    assert one.gap == -other.gap


def test_what_the_teacher_itself_answers_badly_is_neither() -> None:
    scores = [Score("both bad", 3.0, 1.0), Score("hard", 9.0, 5.0), Score("easy", 9.0, 9.0)]
    hard, easy = split(scores, 1.0, min_teacher_score=5.0)
    assert ([one.key for one in hard], [one.key for one in easy]) == (["hard"], ["easy"])


def test_difficulty_compares_the_same_instructions(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    asked = ["what is this?", "what is that?", "is it red?"]
    pool = {one.key: one for text in asked if (one := store.instruction([{"role": "user", "content": text}], []))}
    keys = list(pool)
    before = [Score(keys[0], 1.0, 0.0), Score(keys[2], 1.0, 0.0)]
    after = [Score(keys[0], 1.0, 1.0), Score(keys[1], 1.0, 0.0), Score(keys[2], 1.0, 0.0)]
    report = difficulty(before, after, pool, threshold=0.5, words=2)
    assert report["what is"] == {
        "assessed": 2,
        "hard": 0.5,
        "gap": 0.5,
        "assessed_twice": 1,
        "hard_before": 1.0,
        "hard_after": 0.0,
    }
    assert report["is it"]["hard_after"] == 1.0
