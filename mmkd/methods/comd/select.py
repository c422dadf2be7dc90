"""Which instructions are hard for the student: those on which the teacher's answer is better by a margin."""

from collections.abc import Sequence
from dataclasses import dataclass

from .instructions import Instruction


@dataclass(frozen=True)
class Score:
    """What an assessor makes of the two answers to an instruction; larger is better, `gap` is teacher less student.

    `orders` are a judge's scores (teacher, student) with the teacher's answer shown first, and shown second.
    """

    key: str
    teacher: float
    student: float
    orders: tuple[tuple[float, float], ...] = ()

    @property
    def gap(self) -> float:
        return self.teacher - self.student


def both_orders(key: str, teacher_first: tuple[float, float], student_first: tuple[float, float]) -> Score:
    """The mean over both orders of presentation, each given as (first answer's score, second answer's score)."""
    orders = (teacher_first, (student_first[1], student_first[0]))
    teacher, student = (sum(order[side] for order in orders) / 2 for side in (0, 1))
    return Score(key, teacher, student, orders)


def split(
    scores: Sequence[Score], threshold: float, min_teacher_score: float | None = None
) -> tuple[list[Score], list[Score]]:
    """(hard, easy): hard is a gap of at least `threshold`; both sorted by gap, then the teacher's score, descending.

    As Lion (Jiang et al. 2023) selects; ties keep their order. With `min_teacher_score`, what the teacher itself
    answers worse than that is neither: it has nothing to teach there (ours).
    """
    known = [score for score in scores if min_teacher_score is None or score.teacher >= min_teacher_score]
    ordered = sorted(known, key=lambda score: (-score.gap, -score.teacher))
    return [score for score in ordered if score.gap >= threshold], [
        score for score in ordered if score.gap < threshold
    ]


def difficulty(
    before: Sequence[Score], after: Sequence[Score], pool: dict[str, Instruction], threshold: float, words: int
) -> dict[str, dict[str, float | int | None]]:
    """By type of instruction: how many were assessed, the share of hard ones and the mean gap, and both before."""
    earlier = {score.key: score for score in before}
    types: dict[str, list[Score]] = {}
    for score in after:
        types.setdefault(pool[score.key].type_of(words), []).append(score)
    report: dict[str, dict[str, float | int | None]] = {}
    for name, scores in sorted(types.items(), key=lambda item: (-len(item[1]), item[0])):
        # Before and after are of the same instructions, or the comparison would be of two pools.
        both = [(earlier[score.key], score) for score in scores if score.key in earlier]
        report[name] = {
            "assessed": len(scores),
            "hard": _share([score.gap >= threshold for score in scores]),
            "gap": _share([score.gap for score in scores]),
            "assessed_twice": len(both),
            "hard_before": _share([old.gap >= threshold for old, _ in both]),
            "hard_after": _share([new.gap >= threshold for _, new in both]),
        }
    return report


def _share(values: Sequence[float | bool]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None
