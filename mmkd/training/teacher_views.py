"""Which teachers of a training read prompts or images of their own, and what of the data they need for it."""

from typing import Any

from mmkd.data.teacher_view import TeacherView
from mmkd.preparation.labelling import Labelling
from mmkd.preparation.row_views import RowView
from mmkd.preparation.teacher_prompts import TeacherPrompts, prefixes_of
from mmkd.teachers.several import SeveralTeachers, named_parts

from .config import DistillationConfig
from .rewards import RATED

_READ = ("input_ids", "labels", "seq_lengths")


def teacher_views_of(teacher: Any, args: DistillationConfig) -> dict[str, TeacherView]:
    """The views of a teacher, or of each of several, by name, where it does not read what the student reads."""
    names = [] if teacher is None else named_parts(teacher)
    own = teacher.views if isinstance(teacher, SeveralTeachers) else {}
    views = {name: own.get(name, args.view) for name in names}
    return {name: view for name, view in views.items() if view is not None}


def row_views_of(teacher: Any, args: DistillationConfig) -> dict[str, RowView]:
    """Rows as teachers with views read them, by the teachers' names."""
    settings = (args.privileged_dropout, args.seed, args.teacher_max_length, args.longest_rollout)
    return {name: RowView(view, *settings) for name, view in teacher_views_of(teacher, args).items()}


def prompts_for(teacher: Any, labelling: Labelling, args: DistillationConfig) -> TeacherPrompts | None:
    """What makes rows of text tokens for teachers with prompts of their own; None where none has any."""
    views = teacher_views_of(teacher, args)
    return TeacherPrompts.of(views.values(), labelling, args, [*_routing_column(teacher), RATED]) if views else None


def columns_for(teacher: Any, args: DistillationConfig, vision: bool) -> list[str]:
    """The column that names the teacher of each row, and those that only teachers read.

    In rows with images these are the data's own; text was made tokens before.
    """
    views = teacher_views_of(teacher, args)
    if vision:
        read = [name for view in views.values() for name in view.reads]
    else:
        read = [f"{prefix}{name}" for prefix in prefixes_of(views).values() for name in _READ]
    return [*_routing_column(teacher), *dict.fromkeys(read)]


def image_columns(teacher: Any, args: DistillationConfig) -> list[str]:
    """The columns with the images that teachers see in the place of the student's."""
    views = teacher_views_of(teacher, args).values()
    return list(dict.fromkeys(view.images_column for view in views if view.images_column is not None))


def _routing_column(teacher: Any) -> list[str]:
    return [teacher.column] if isinstance(teacher, SeveralTeachers) and teacher.column is not None else []
