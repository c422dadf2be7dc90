"""Checks of recipes whose student is its own teacher: `teacher: self`."""

from collections.abc import Collection
from typing import Any

from mmkd.errors import UserError
from mmkd.results.own_teacher import SELF
from mmkd.training.config import DistillationConfig
from mmkd.training.method import METHODS

from .arguments import RunArguments, StudentArguments

_LOADING = ("teacher_revision", "teacher_dtype", "teacher_attn_implementation", "teacher_load_in_4bit")
_LOADING += ("teacher_load_in_8bit", "teacher_model_init_kwargs")
"""Keys that say how a teacher is loaded."""


def check_self(arguments: RunArguments, training: Any) -> None:
    """Raises UserError where `self_teacher` says how the student teaches itself, and it does not."""
    teachers = arguments.teachers
    named = [keys.get("teacher") for keys in teachers.values()] if isinstance(teachers, dict) else [arguments.teacher]
    if isinstance(training, DistillationConfig) and training.self_teacher is not None and SELF not in named:
        raise UserError(
            f"self_teacher is {training.self_teacher}, but the student is not its own teacher. Set teacher: self, or "
            "remove self_teacher.",
            because="meaning",
        )


def named_self(
    arguments: RunArguments, training: DistillationConfig, student: StudentArguments, given: Collection[str]
) -> dict[str, Any]:
    """The keys that name the student as the teacher, for whoever reads its files.

    `given` are the keys that speak of this teacher. Raises UserError where the student cannot teach itself as asked.
    """
    method = METHODS[arguments.method]
    if method.build is not None or method.drive is not None:
        raise UserError(
            f"teacher: self is for kd, taid, alm, llava_kd and sft; method {arguments.method} has no teacher beside "
            "the loss of each token. Name a teacher.",
            because="not built",
        )
    if arguments.student is None:
        raise UserError("teacher: self needs a student: set `student`.", because="meaning")
    away = next((name for name in ("teacher_cache", "teacher_server") if getattr(arguments, name) is not None), None)
    form = training.self_teacher or "base"
    if away is not None and form != "base":
        raise UserError(
            f"self_teacher: {form} is a student that training changes, and {away} answers for one that stays as it "
            f"is. Set self_teacher: base, or remove {away}.",
            because="meaning",
        )
    if away is not None and arguments.student_init != "pretrained":
        raise UserError(
            f"{away} answers for the model named {arguments.student}, and student_init: {arguments.student_init} "
            f"makes another one of it. Remove {away}, or save the new student first and name its folder.",
            because="not built",
        )
    if away is None:
        _check_loading(given)
    # trl names the newest one of a student.
    revision = None if student.model_revision == "main" else student.model_revision
    return {"teacher": arguments.student, "teacher_revision": revision}


def _check_loading(given: Collection[str]) -> None:
    """Raises UserError for keys that say how to load a teacher, where none is loaded."""
    key = next((name for name in _LOADING if name in given), None)
    if key is not None:
        raise UserError(
            f"{key} says how a teacher is loaded, and teacher: self loads none: the student teaches as it is. Remove "
            f"{key}, or name the student's folder as the teacher to load a second copy of it.",
            because="meaning",
        )
