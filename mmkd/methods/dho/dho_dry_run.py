"""What a run of dho would do, before the teacher is asked about all rows."""

import math
import time

import numpy as np
from jaxtyping import Bool, Int
from rich.console import Console
from rich.table import Table

from mmkd.data.classification import HIDDEN
from mmkd.recipe.recipe import Run
from mmkd.teachers.class_logits import compute_class_logits

from .class_run import Classes, check_arguments, load_classes, settings_of
from .class_teacher import load_class_teacher, runs_of_teachers
from .dho_build import new_student, student_processor

_JUDGED = 256
"""Rows that a dry run judges the teacher by, at most."""


def dry_run_dho(run: Run, console: Console) -> None:
    """Prints the plan of a run: student, classes, rows and steps, and how long the teacher takes, by a few rows."""
    training = settings_of(run)
    check_arguments(run)
    classes = load_classes(run)
    data, rows = classes.data, classes.rows
    student_processor(run, classes.is_text)
    labeled = int((training.shown_labels(rows.labels, data.class_names) != HIDDEN).sum())
    table = Table(title="mmkd dho: dry run", show_header=False)
    table.add_row("student", f"{new_student(run, data).num_parameters() / 1e6:.2f} M parameters, {training.objective}")
    table.add_row("classes", f"{len(data.class_names)}: {', '.join(data.class_names[:6])}, ...")
    table.add_row("rows", f"{labeled:,} labelled, {len(rows) - labeled:,} unlabelled")
    for name, split in (("validation", data.validation), ("test", data.test)):
        table.add_row(name, "none" if split is None else f"{len(split):,} rows")
    if training.asks_teacher:
        for name, part in runs_of_teachers(run).items():
            if part.arguments.teacher is not None:
                _add_teacher(table, name, part, classes)
    console.print(table)


def _add_teacher(table: Table, name: str, run: Run, classes: Classes) -> None:
    """How often a teacher is right, and how long it takes for all rows, by a few of them."""
    rows, teacher = classes.rows, load_class_teacher(run, classes)
    places = _sampled(rows.labels)
    start = time.perf_counter()
    answers = compute_class_logits(
        teacher, lambda row: rows.raw(int(places[row])), len(places), settings_of(run).teacher_batch_size
    )
    seconds = (time.perf_counter() - start) / len(places)
    known = rows.labels[places] != HIDDEN
    right = (answers.argmax(-1).numpy() == rows.labels[places])[known]
    table.add_row(f"teacher {name}".strip(), f"{teacher.kind}; {_accuracy(right)}")
    table.add_row(
        f"pass of teacher {name}" if name else "teacher's pass", f"about {seconds * len(rows) / 60:.1f} minutes, once"
    )


def _sampled(labels: Int[np.ndarray, "row"]) -> Int[np.ndarray, "row"]:
    """Rows to judge a teacher by, drawn from all that have a label, or from all where none has: files are often sorted
    by class, so that the first rows would be of one class alone."""
    known = np.flatnonzero(labels != HIDDEN)
    rows = known if len(known) else np.arange(len(labels))
    return np.sort(np.random.default_rng(0).permutation(rows)[:_JUDGED])


def _accuracy(right: Bool[np.ndarray, "row"]) -> str:
    """The share of right answers, with Wilson's 95 % interval, which holds for few rows and near 0 and 1."""
    n = len(right)
    if n == 0:
        return "no row has a label to judge it by"
    share, z = float(right.mean()), 1.96
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return (
        f"{share:.0%} of {n:,} rows drawn at random right (95 % interval {middle - half:.0%} to {middle + half:.0%})"
    )
