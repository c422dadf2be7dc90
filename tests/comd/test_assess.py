"""Assessors: judges that can be trusted and judges that cannot, and scores that need none."""

from pathlib import Path

import pytest

from mmkd.generation.generator import Sampling
from mmkd.methods.comd.assess import (
    AgreementAssessor,
    AnswerPair,
    Assessment,
    JudgeAssessor,
    ReferenceAssessor,
    parse_scores,
)
from mmkd.methods.comd.comd_prompts import Prompts
from mmkd.methods.comd.instructions import text_of
from mmkd.methods.comd.reply_record import Question, Record
from tests.comd.stand_ins import Scripted, instruction, nothing

PAIRS = [
    AnswerPair(instruction(f"what is number {n}?"), "a long answer " * (n % 4 + 1), "short " * (n % 3 + 1))
    for n in range(12)
]


def judged(question: Question) -> list[str]:
    """The two answers that a judge is shown."""
    text = text_of(question.messages[0])
    return [part.split(":\n", 1)[1].split("\n\n")[0].strip() for part in text.split("Answer of assistant")[1:]]


def by_length(question: Question) -> str:
    return " ".join(str(max(1, min(10, len(answer) // 6))) for answer in judged(question)) + "\nLonger is better."


def assess(folder: Path, engine: Scripted, pairs: list[AnswerPair] = PAIRS, retries: int = 2) -> Assessment:
    record = Record(folder / "record.jsonl")
    return JudgeAssessor(record, engine, Prompts.read(None), Sampling(16), retries).assess(pairs, "phase", nothing)


def test_a_judge_sees_both_orders_and_swapping_teacher_and_student_negates_the_gaps(tmp_path: Path) -> None:
    engine = Scripted(by_length)
    scores = assess(tmp_path, engine).scores
    assert len(engine.asked) == 24
    assert judged(engine.asked[0]) == list(reversed(judged(engine.asked[1])))
    swapped = [AnswerPair(pair.instruction, pair.student, pair.teacher) for pair in PAIRS]
    mirrored = assess(tmp_path / "swapped", Scripted(by_length), swapped).scores
    assert [one.gap for one in scores] == [-one.gap for one in mirrored]
    assert any(one.gap for one in scores)
    assert all(first == second for one in scores for first, second in [one.orders])


def test_what_cannot_be_parsed_is_asked_again_then_dropped_and_counted(tmp_path: Path) -> None:
    def stubborn(question: Question) -> str:
        first = text_of(question.messages[0])
        if "number 3?" in first:
            return "I would rather not."
        if "number 5?" in first and question.sample == 0:
            return "Both are fine."
        return by_length(question)

    engine = Scripted(stubborn)
    found = assess(tmp_path, engine)
    # Never a tie: the pair is gone.
    assert len(found.scores) == 11
    assert (found.dropped, found.asked_again) == (1, 2 + 2 + 2)
    again = [question for question in engine.asked if question.sample]
    assert {text_of(question.messages[-1])[:10] for question in again} == {"Your reply"}
    assert [message["role"] for message in again[0].messages] == ["user", "assistant", "user"]


def test_a_judge_that_answers_nonsense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nonsense: 12 of 12 pairs"):
        assess(tmp_path, Scripted(lambda question: "I like both"))


@pytest.mark.parametrize("reply, side", [("8 5", "first"), ("5 8", "second")])
def test_a_judge_that_prefers_a_place_is_refused(tmp_path: Path, reply: str, side: str) -> None:
    with pytest.raises(ValueError, match=f"goes by the order: 100% of its 24 preferences .* shown {side}"):
        assess(tmp_path, Scripted(lambda question: reply))


def test_a_judge_that_always_prefers_the_teacher_is_not_one_sided(tmp_path: Path) -> None:
    pairs = [AnswerPair(pair.instruction, "the teacher's answer is long", "short") for pair in PAIRS]
    found = assess(tmp_path, Scripted(by_length), pairs)
    assert found.first_preferred == 0.5
    assert all(one.gap > 0 for one in found.scores)


def test_a_judge_without_preferences_calls_nothing_hard(tmp_path: Path) -> None:
    found = assess(tmp_path, Scripted(lambda question: "7 7"))
    assert found.first_preferred is None
    assert {one.gap for one in found.scores} == {0.0}


@pytest.mark.parametrize(
    "reply, scores",
    [
        ("8 6", (8, 6)),
        ("8, 6\nBecause of 3 reasons.", (8, 6)),
        ("\n 7.5 9\n", (7.5, 9)),
        ("8/10 and 6/10", (8, 6)),
        ("Assistant 1: 8, Assistant 2: 6", (8, 6)),
        ("**10** **1**", (10, 1)),
        ("8", None),
        ("8 6 7", None),
        ("0 6", None),
        ("11 6", None),
        ("eight six", None),
        ("The scores are below.\n8 6", None),
        ("", None),
    ],
)
def test_scores_of_a_reply(reply: str, scores: tuple[float, float] | None) -> None:
    assert parse_scores(reply) == scores


def test_references() -> None:
    known = [
        AnswerPair(instruction("what?", "A red shape."), "a red shape", "a red circle"),
        AnswerPair(PAIRS[0].instruction, "x", "y"),
    ]
    (exact,) = ReferenceAssessor("exact").assess(known, "phase", nothing).scores
    assert (exact.teacher, exact.student) == (1.0, 0.0)
    (rouge,) = ReferenceAssessor("rouge").assess(known, "phase", nothing).scores
    assert (rouge.teacher, rouge.student) == (1.0, pytest.approx(2 / 3))
    with pytest.raises(ValueError, match="no instruction has one"):
        ReferenceAssessor("exact").assess(known[1:], "phase", nothing)


def test_agreement() -> None:
    pairs = [
        AnswerPair(instruction("what is it?"), "Blue", "blue"),
        AnswerPair(instruction("and that?"), "blue", "red"),
    ]
    assert [one.gap for one in AgreementAssessor().assess(pairs, "phase", nothing).scores] == [0.0, 1.0]
