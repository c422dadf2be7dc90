"""Which answers are kept and why the others are not, by the verdicts on them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mmkd.generation.thoughts import CLOSE, OPEN, thought_of, with_thoughts
from mmkd.recipe.cache_arguments import CacheArguments

from .answer_verdicts import StoredAnswer

ACCEPTED = ""
"""The reason of an answer that is kept."""

_WORSE = ("wrong", "no final answer", "minority", "rated too low")
"""Reasons that say something of what an answer says."""

Verdict = dict[str, Any]


@dataclass(frozen=True)
class JudgedAnswer:
    """An answer, its verdicts, and why it is rejected: `ACCEPTED` where it is not."""

    answer: StoredAnswer
    verdict: Verdict
    reason: str


@dataclass
class Tally:
    """What became of the answers of a split."""

    prompts: int = 0
    prompts_kept: int = 0
    answers: int = 0
    kept: int = 0
    tokens_kept: int = 0
    pairs: int = 0
    right: int = 0
    wrong: int = 0
    reasons: Counter[str] = field(default_factory=Counter[str])
    """Why answers were rejected."""

    def count(self, group: Sequence[JudgedAnswer], pairs: int) -> None:
        """Counts the answers to a prompt, of which so many pairs were made."""
        kept = [judged for judged in group if judged.reason == ACCEPTED]
        self.prompts += 1
        self.prompts_kept += bool(kept)
        self.answers += len(group)
        self.kept += len(kept)
        self.tokens_kept += sum(judged.answer.tokens for judged in kept)
        self.pairs += pairs
        self.reasons.update(judged.reason for judged in group if judged.reason != ACCEPTED)
        rulings = [judged.verdict.get("right") for judged in group]
        self.right += rulings.count(True)
        self.wrong += rulings.count(False)

    def facts(self) -> dict[str, Any]:
        """As plain values."""
        return {**vars(self), "reasons": dict(sorted(self.reasons.items(), key=lambda pair: (-pair[1], pair[0])))}


def judged(answers: Sequence[StoredAnswer], verdicts: Sequence[Verdict], keys: CacheArguments) -> list[JudgedAnswer]:
    """The answers to one prompt, each with the reason for which it is rejected."""
    most = _most_votes(verdicts) if keys.cache_keep == "majority" else 0
    return [
        JudgedAnswer(answer, verdict, _unusable(answer, keys) or _reason(verdict, len(answers), most, keys))
        for answer, verdict in zip(answers, verdicts, strict=True)
    ]


def _most_votes(verdicts: Sequence[Verdict]) -> int:
    """The votes of the most frequent final answer; more than there are where two share the first place."""
    most = max((verdict["votes"] for verdict in verdicts), default=0)
    voters = sum(verdict["votes"] == most for verdict in verdicts)
    return most if voters == most else len(verdicts) + 1


def _unusable(answer: StoredAnswer, keys: CacheArguments) -> str:
    if answer.finish_reason == "length":
        if not keys.cache_keep_truncated:
            return "cut off"
    elif answer.finish_reason != "stop":
        return f"ended by {answer.finish_reason}"
    thought = thought_of(answer.text)
    if not thought.ends:
        return "thoughts without an end"
    return ACCEPTED if thought.answer else "empty"


def _reason(verdict: Verdict, samples: int, most: int, keys: CacheArguments) -> str:
    if keys.cache_keep == "judge":
        if verdict["rating"] is None:
            return "no rating of the judge"
        return ACCEPTED if verdict["rating"] >= keys.cache_judge_min else "rated too low"
    if keys.cache_keep == "all":
        return ACCEPTED
    if keys.cache_keep == "majority":
        if verdict["final"] is None:
            return "no final answer"
        return (
            ACCEPTED if verdict["votes"] >= most and verdict["votes"] > keys.cache_majority * samples else "minority"
        )
    if verdict["right"] is None:
        return "nothing to compare it with"
    if verdict["right"]:
        return ACCEPTED
    return "no final answer" if verdict["final"] is None else "wrong"


def learnt_text(answer: StoredAnswer, thoughts: str) -> str:
    """The text that is trained on, with its thoughts ("keep") or without ("strip")."""
    thought = thought_of(answer.text)
    if thoughts == "strip":
        return thought.answer
    # The opening stood in the prompt of the teacher; the student's prompt has none.
    opened_before = CLOSE in answer.text and OPEN not in answer.text
    return with_thoughts(thought.thoughts, thought.answer) if opened_before else answer.text


def pairs_of(group: Sequence[JudgedAnswer], limit: int) -> list[tuple[JudgedAnswer, JudgedAnswer]]:
    """Kept and rejected answers to a prompt, each in at most one pair.

    Cut-off and empty answers are no rejected ones: a student would learn from their length and not from what they say.
    """
    kept = _distinct([own for own in group if own.reason == ACCEPTED])
    rejected = [own for own in group if own.reason in _WORSE]
    return list(zip(kept, _distinct(rejected), strict=False))[:limit]


def _distinct(group: Sequence[JudgedAnswer]) -> list[JudgedAnswer]:
    return list({own.answer.text: own for own in reversed(group)}.values())[::-1]
