"""What rounds are reported by: their lines, time and tokens of each phase, and one file about all rounds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmkd.errors import UserError

from .assess import AnswerPair, Assessment
from .instructions import Instruction
from .reply_record import Record, Reply
from .round_files import read_json, write_json, write_lines
from .select import split

PHASES = ("answer", "train", "student", "assess", "augment", "evaluate")
"""The teacher answers, the student is trained, the student answers, both are assessed, ..., held-out answers."""

SUMMARY = "rounds.json"


def phases_of(record: Record, number: int, train_seconds: float) -> dict[str, dict[str, float]]:
    """Seconds of each phase of a round, their share of the round, and its tokens per second.

    Seconds are those of the models themselves, kept with each reply: an interrupted round reports what it cost.
    """
    phases: dict[str, dict[str, float]] = {}
    for name in PHASES:
        usage = record.usage[f"round-{number}/{name}"]
        seconds = train_seconds if name == "train" else usage.seconds
        phases[name] = {"seconds": round(seconds, 3), "replies": usage.replies, "tokens": usage.tokens}
        phases[name]["tokens_per_second"] = round(usage.tokens / seconds, 1) if seconds > 0 else 0.0
    total = sum(phase["seconds"] for phase in phases.values())
    for phase in phases.values():
        phase["share"] = round(phase["seconds"] / total, 4) if total > 0 else 0.0
    return phases


def write_rounds(folder: Path, reports: Sequence[dict[str, Any]], ended: str) -> None:
    """Writes the reports of all rounds to one file."""
    write_json(folder / SUMMARY, {"ended": ended, "rounds": list(reports)})


def read_rounds(folder: str | Path) -> list[dict[str, Any]]:
    """The reports of a run's finished rounds, in order. Raises UserError when there are none."""
    paths = sorted(Path(folder).glob("round-*/report.json"), key=lambda path: int(path.parent.name.partition("-")[2]))
    if not paths:
        raise UserError(f"{folder} holds no round of comd that is finished (round-0/report.json).")
    return [read_json(path) for path in paths]


def answer_row(instruction: Instruction, reply: Reply) -> dict[str, Any]:
    """A line of a round's answers."""
    return {"key": instruction.key, "text": reply.text, "tokens": reply.tokens, "finish_reason": reply.finish_reason}


def new_row(instruction: Instruction) -> dict[str, Any]:
    """A line of a round's new instructions."""
    facts = {"key": instruction.key, "kind": instruction.kind, "parent": instruction.parent, "text": instruction.text}
    return {**facts, "prompt": list(instruction.prompt), "images": list(instruction.images)}


def write_scores(
    folder: Path, pairs: Sequence[AnswerPair], assessment: Assessment, threshold: float, type_words: int
) -> None:
    """Writes what was assessed, hard ones first, as they are selected."""
    by_key = {pair.instruction.key: pair for pair in pairs}
    hard, easy = split(assessment.scores, threshold)
    rows = []
    for score in (*hard, *easy):
        pair = by_key[score.key]
        facts = {"key": score.key, "type": pair.instruction.type_of(type_words), "hard": score.gap >= threshold}
        scores = {"teacher": score.teacher, "student": score.student, "gap": score.gap, "orders": score.orders}
        rows.append({**facts, **scores, "teacher_answer": pair.teacher, "student_answer": pair.student})
    write_lines(folder / "scores.jsonl", rows)
