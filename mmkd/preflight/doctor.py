"""The checks of a recipe one after the other, and what they found as a table."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import datasets
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmkd.preparation.checks import check_held_out
from mmkd.recipe.recipe import Recipe, Run
from mmkd.recipe.run import check_surroundings
from mmkd.recipe.run_teacher import reads_teacher
from mmkd.training.method import METHODS

from . import costs
from . import row_checks as rows
from . import teacher_checks as teachers
from . import token_checks as tokens
from . import trace_checks as traces
from . import view_checks as views
from .book import Book
from .chunk_checks import alignment
from .empty_models import empty_student
from .facts import Finding, Rendered, Sample, Side, render, student_side, take_sample, teacher_side
from .feature_checks import named_modules
from .quantisation_checks import quantised_student
from .stage_checks import each_run

STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def doctor(recipe: Recipe, console: Console) -> int:
    """Examines a recipe and prints what was found; returns 0 when its run would be sound, 1 when it would not.

    Loads configs, tokenizers and a sample of rows, and no weights. Raises UserError for a recipe that cannot be read.
    """
    findings: list[Finding] = []
    for stage in each_run(recipe):
        with quiet():
            stage_findings = examine(stage.run, sharded=stage.config not in (None, "single_gpu", "ddp"))
        stage_findings = [
            replace(finding, message=stage.place(finding.message), advice=stage.place(finding.advice))
            for finding in stage_findings
        ]
        console.print(_table(stage.title, stage_findings))
        findings += stage_findings
    problems, warnings = (
        sum(finding.severity == severity for finding in findings) for severity in ("problem", "warning")
    )
    verdict = Text("Not sound: " if problems else "Sound: ", style=STYLES["problem" if problems else "ok"])
    console.print(verdict + Text(f"{_count(problems, 'problem')}, {_count(warnings, 'warning')}."))
    return 1 if problems else 0


def examine(run: Run, sharded: bool = False) -> list[Finding]:
    """What all checks of a run's method found; `sharded` says that it spreads its weights over several devices."""
    examine_run = METHODS[run.arguments.method].examine or examine_tokens
    return examine_run(run, sharded)


def examine_tokens(run: Run, sharded: bool, own: Callable[[Book, Sample | None], None] | None = None) -> list[Finding]:
    """What all checks of a training over tokens found, and those that a method has of its `own`.

    A check that cannot be made is a problem, and the others go on without it.
    """
    book, alone = Book(), run.by_teacher()
    book.attempt("settings", check_surroundings, run)
    student = book.attempt("student", student_side, run)
    sample = book.attempt("data", take_sample, run)
    ours = None
    if student is not None and sample is not None:
        ours = book.attempt("data", render, run, student, sample)
    if sample is not None:
        book.attempt("evaluation", check_held_out, sample.rows.get("eval"), run.training)
    trained = student if student is None or ours is None else student.prepared_as(ours, run)
    if sample is not None and run.arguments.teacher_column is not None:
        book.check("routes", rows.routes, sample, run)
    if own is not None:
        own(book, sample)
    if run.cache.job == "generate":
        _answers(book, run)
    sides: dict[str, Side] = {}
    for name, teacher_run in alone.items():
        book.teacher = name
        teacher = None if teacher_run.arguments.teacher is None else book.attempt("teacher", teacher_side, teacher_run)
        theirs = None
        if teacher is not None:
            sides[name] = teacher
            if trained is not None:
                theirs = _against_teacher(book, teacher_run, trained, teacher, sample, ours)
        if sample is not None and teacher_run.training.view is not None:
            book.check("teacher_view", views.own_prompt, teacher_run, sample)
        if teacher_run.itself:
            book.check("teacher", teachers.itself, teacher_run, len(alone) == 1)
        if student is not None:
            book.check("special tokens", tokens.special_tokens, student, teacher, ours, teacher_run)
        if student is not None and sample is not None and ours is not None and sample.has_images:
            book.check("images", rows.images, ours, theirs, sample, teacher_run)
    book.teacher = ""
    named = [name for name, teacher_run in alone.items() if teacher_run.arguments.teacher is not None]
    if student is not None and all(name in sides for name in named):
        book.check("literature", teachers.literature, run)
        book.check("features", named_modules, run, student, sides)
    if student is not None:
        book.check("quantisation", quantised_student, run, student)
    if student is not None and sample is not None and ours is not None and ours.usable:
        book.check("rendering", tokens.rendering, ours)
        book.check("end of answer", tokens.end_of_sequence, student, ours, sample, run)
        book.check("length", rows.lengths, ours, run, [student, *sides.values()])
        _costs(book, run, student, sides, sample, ours, sharded)
    if student is not None and trained is not None:
        for book.teacher, teacher_run in alone.items():
            _away(book, teacher_run, student, trained.rows, sides.get(book.teacher), sample)
    return book.findings


def _against_teacher(
    book: Book, run: Run, student: Side, teacher: Side, sample: Sample | None, ours: Rendered | None
) -> Rendered | None:
    """Compares vocabularies and templates; returns the sample as the teacher renders it."""
    if tokens.compares_tokens(run):
        book.check("vocabulary", tokens.vocabulary, student, teacher, ours)
    if sample is None or ours is None:
        return None
    if sample.has_images and not teacher.is_vision:
        text = f"The rows have images, and the teacher {teacher.name} reads text only."
        book.findings.append(Finding("problem", "images", text, "Use a vision-language teacher."))
        return None
    missing = tokens.without_template(sample, teacher)
    if missing is not None:
        book.findings.append(missing)
        return None
    theirs = book.attempt("chat template", render, run, teacher, sample)
    if theirs is not None and not tokens.compares_tokens(run):
        book.check("alignment", alignment, ours, theirs)
    elif theirs is not None and tokens.is_related(student, teacher):
        book.check("chat template", tokens.chat_template, ours, theirs, teacher.name)
    return theirs


def _costs(
    book: Book, run: Run, student: Side, sides: dict[str, Side], sample: Sample, ours: Rendered, sharded: bool
) -> None:
    alone = run.by_teacher()
    loaded = [(alone[name], side) for name, side in sides.items() if reads_teacher(alone[name].arguments)]
    if book.attempt("student", empty_student, run, student) is not None:
        book.check("memory", costs.memory, run, student, loaded, sample, ours, sharded)
    for book.teacher, teacher_run in alone.items():
        if teacher_run.arguments.teacher_cache is not None and costs.takes_room(teacher_run.arguments.teacher_cache):
            book.check("disk", costs.cache_room, teacher_run, sample, ours)


def _away(book: Book, run: Run, student: Side, known: int, teacher: Side | None, sample: Sample | None) -> None:
    """Looks at a teacher that answers from a server or a cache."""
    arguments = run.arguments
    there = arguments.teacher_cache is not None and not costs.is_to_be_built(arguments.teacher_cache)
    if run.cache.job == "generate" or (arguments.teacher is not None and not there):
        if arguments.teacher_cache is not None:
            book.check("cache", teachers.cache_to_build, run)
    elif arguments.teacher_cache is not None:
        _cache(book, run, student, known, teacher, sample)
        # What a finished cache says needs no server.
        return
    if arguments.teacher_server is not None:
        book.check("server", teachers.server, run, student, teacher, sample)


def _answers(book: Book, run: Run) -> None:
    """Looks at who writes answers, and how they are verified."""
    book.check("answers", traces.answerer, run)
    if run.cache.cache_verifier is not None:
        book.check("verifier", traces.verifier, run)
    if run.cache.cache_judge_server is not None:
        book.check("judge", traces.judge, run)


def _cache(book: Book, run: Run, student: Side, known: int, reader: Side | None, sample: Sample | None) -> None:
    teacher = book.attempt("cache", teachers.open_cache, run)
    if teacher is not None:
        book.check("cache", teachers.cache, run, known, teacher)
        book.check("cache", teachers.origin, run, teacher.cache)
        if sample is not None:
            book.check("cache", teachers.preparation, run, student, reader, sample, teacher)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of a few hundred rows between the findings."""
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not shown:
            datasets.enable_progress_bars()


def _table(recipe: str, findings: list[Finding]) -> Table:
    table = Table(title=f"mmkd doctor {recipe}", title_justify="left", box=box.SIMPLE, show_header=False)
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        cell = Text(finding.message)
        if finding.advice:
            cell.append(f"\n{finding.advice}", style="italic")
        table.add_row(Text(finding.severity, style=STYLES[finding.severity]), finding.name, cell)
    return table


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
