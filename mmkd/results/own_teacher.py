"""Records of runs whose student was its own teacher: `teacher: self` among the keys."""

from collections.abc import Mapping
from typing import Any

SELF = "self"
"""The name of a teacher that is the student itself."""

FORMS = {
    "base": "the student itself, as it was before training",
    "live": "the student itself, as it was at each step",
    "ema": "the student itself, averaged over the steps",
}
"""What a reader is told of a student that taught itself."""


def own_form(keys: Mapping[str, Any]) -> str | None:
    """What a reader is told where a recipe's keys name the student as a teacher; None where they do not."""
    taught = SELF in (own.get("teacher") for own in (keys, *_several(keys)))
    return FORMS[str(keys.get("self_teacher") or "base")] if taught else None


def with_teacher_named(keys: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys of a teacher with the model in it that a student which taught itself began as."""
    if keys.get("teacher") != SELF:
        return keys
    return {**keys, "teacher": keys.get("student"), "teacher_revision": keys.get("model_revision")}


def _several(keys: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    teachers = keys.get("teachers")
    return list(teachers.values()) if isinstance(teachers, Mapping) else []
