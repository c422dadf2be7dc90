"""What teachers with prompts of their own read, for doctor: a row as both sides read it, and what looks wrong."""

from collections.abc import Iterator, Mapping
from typing import Any

from mmkd.data.canonical import CHATS
from mmkd.data.columns import template_columns
from mmkd.data.prompts import question_of, words_of
from mmkd.data.teacher_view import ANSWER, TeacherView
from mmkd.data.templates import is_empty
from mmkd.recipe.recipe import Run

from .facts import Finding, Sample

_SHOWN = 400


def own_prompt(run: Run, sample: Sample) -> list[Finding]:
    """What a teacher with a view reads of the first row, and whether it reads more than the student at all."""
    return list(_looked_at(run, sample))


def _looked_at(run: Run, sample: Sample) -> Iterator[Finding]:
    view = run.training.view
    assert view is not None
    rows: list[dict[str, Any]] = [dict(row) for row in sample.rows["train"]]  # pyright: ignore[reportCallIssue, reportArgumentType]
    view.check(list(rows[0]), "train")
    asked = [(_question(row), _question(view.rewrite(row))) for row in rows]
    student, teacher = asked[0]
    yield Finding(
        "ok", "teacher_view", f"The student is asked: {_short(student)}\nThe teacher is asked: {_short(teacher)}"
    )
    if view.images_column is None and all(ours == theirs for ours, theirs in asked):
        yield Finding(
            "warning",
            "teacher_view",
            f"In all {len(rows)} rows looked at, the teacher reads what the student reads.",
            "Write into the view what the teacher should know, or remove teacher_view.",
        )
    yield from _empty_columns(view, rows)
    reads_answer = view.template is not None and ANSWER in template_columns(view.template)
    if reads_answer and not run.training.on_policy_fraction and run.cache.job != "generate":
        yield Finding(
            "warning",
            "teacher_view",
            "The teacher reads the row's own answer, and judges that same answer: it can copy what it has just read.",
            "Set on_policy_fraction: 1, so that it judges the student's answers, or leave {answer} out.",
        )


def _empty_columns(view: TeacherView, rows: list[dict[str, Any]]) -> Iterator[Finding]:
    for name in view.columns:
        empty = sum(is_empty(row[name]) for row in rows)
        if empty:
            yield Finding(
                "warning",
                "teacher_view",
                f"The column {name!r} is empty in {empty} of {len(rows)} rows looked at, and the teacher's prompt has "
                "a gap there.",
                "Fill it, or filter such rows out.",
            )


def _question(row: Mapping[str, Any]) -> str:
    return words_of(question_of(row)) if any(name in row for name in CHATS) else row["text"]


def _short(text: str) -> str:
    """A prompt in one line."""
    line = repr(text)
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."
