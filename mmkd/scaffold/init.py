"""`mmkd init`: from answers to a recipe that is checked and explained."""

import os
from datetime import date
from pathlib import Path

from rich.text import Text

from mmkd.files import write_file
from mmkd.preflight.doctor import doctor, quiet
from mmkd.recipe.recipe import Recipe
from mmkd.schema_lines import schema_line
from mmkd.training.method import METHODS

from .class_recipe import draft_classes
from .draft import Draft, counted
from .init_answers import Answers, Wishes, gather
from .memory_fit import Fit
from .questions import Asker
from .token_recipe import draft_tokens


def init(wishes: Wishes, asker: Asker) -> int:
    """Asks what is not given, writes the recipe, checks it and says what comes next; the exit status of doctor.

    Raises UserError for what cannot be, before anything is written; so does an interruption leave nothing.
    """
    console = asker.console
    written: Path | None = None
    try:
        with quiet():
            answers = gather(asker, wishes)
        console.print(Text(f"\nLooking at {answers.data}, {answers.teacher} and {_student_of(answers)} ..."))
        classes = METHODS[answers.task.method].predicts == "classes"
        with quiet():
            draft, fit = draft_classes(answers) if classes else draft_tokens(answers, console)
        write_file(answers.output, schema_line("recipe", answers.output) + draft.text(header(answers)))
        written = answers.output
        console.print(Text(f"\nWrote {answers.output}. {_summary(draft, fit, answers)}\n", style="bold"))
        status = doctor(Recipe.read(answers.output), console)
    except (KeyboardInterrupt, EOFError):
        left = "Nothing was written." if written is None else f"{written} is written, and not checked."
        console.print(Text(f"\nInterrupted. {left}"))
        return 130
    console.print(Text("\nNext:", style="bold"))
    for command, what in next_commands(draft, answers):
        console.print(Text.assemble(("  " + command.ljust(46), "cyan"), ("  " + what, "dim")), overflow="fold")
    return status


def header(answers: Answers) -> list[str]:
    """What stands at the top of the recipe."""
    path = answers.output
    return [
        f"# {answers.teacher} teaches {_student_of(answers)} on {answers.data}, on {answers.device.name}.",
        f"# Written by `mmkd init` on {date.today().isoformat()}. Check your edits: mmkd doctor {path}",
        f"# All keys and what they mean: mmkd-train {path} --help_keys",
    ]


def next_commands(draft: Draft, answers: Answers) -> list[tuple[str, str]]:
    """What to run after this, with a word on each."""
    path, folder, keys = answers.output, answers.output_dir, draft.keys
    method = METHODS[keys["method"]]
    commands = []
    if "teacher_server" in keys:
        commands.append((f"scripts/serve_teacher.sh {answers.teacher}", "runs the teacher, if no server does yet"))
    if "teacher_cache" in keys and method.predicts == "tokens":
        commands.append((f"mmkd cache build {path}", "runs the teacher once"))
    commands.append((f"mmkd-train {path} --dry_run", "parameters, tokens, memory, the first batch"))
    commands.append((f"mmkd-train {path}", "trains"))
    if method.predicts == "tokens":
        commands.append((f"mmkd eval {folder} --measures", "how near the student is to the teacher"))
    commands.append((f"mmkd report {folder}", f"curves, tables and samples: {os.path.join(folder, 'report.html')}"))
    return commands


def _summary(draft: Draft, fit: Fit, answers: Answers) -> str:
    rows = draft.keys["per_device_train_batch_size"]
    if not fit.fits:
        return f"It does not fit {answers.device.name}: the recipe says what would help."
    taken = [name for name, key in _NAMES.items() if draft.keys.get(key)]
    return f"It fits {answers.device.name} with {counted(rows)} at a time" + (
        f", by {', '.join(taken)}." if taken else "."
    )


_NAMES = {
    "activation checkpointing": "activation_checkpointing",
    "a teacher in 4 bits": "teacher_load_in_4bit",
    "a teacher_cache": "teacher_cache",
    "LoRA": "use_peft",
}


def _student_of(answers: Answers) -> str:
    if answers.student is None:
        return f"a student of {answers.keep_layers} of its layers"
    return answers.student
