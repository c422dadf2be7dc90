"""The recipe of answers: written, checked, and what to do with it."""

import os
import shlex
from datetime import date

from rich.console import Console
from rich.text import Text

from mmkd.files import write_file
from mmkd.preflight.doctor import doctor, quiet
from mmkd.recipe.recipe import Recipe
from mmkd.schema_lines import schema_line
from mmkd.training.method import METHODS

from .class_recipe import draft_classes
from .draft import Draft, counted
from .init_answers import Answers
from .memory_fit import Fit
from .token_recipe import draft_tokens


def write_recipe(answers: Answers, console: Console) -> Draft:
    """Writes the recipe, and says how it fits. Raises UserError for data and models that do not go together."""
    what = f"Looking at {answers.data}, {answers.teacher} and {_student_of(answers)} ..."
    with quiet(), console.status(Text(what)):
        classes = METHODS[answers.task.method].predicts == "classes"
        draft, fit = draft_classes(answers) if classes else draft_tokens(answers, console)
    write_file(answers.output, draft.text(header(answers)))
    console.print(Text(f"\nWrote {answers.output}. {_summary(draft, fit, answers)}\n", style="bold"))
    return draft


def check_recipe(draft: Draft, answers: Answers, console: Console) -> int:
    """Runs doctor on the recipe and prints what comes next; doctor's exit status."""
    status = doctor(Recipe.read(answers.output), console)
    console.print(Text("\nNext:", style="bold"))
    for command, what in next_commands(draft, answers):
        line, comment = Text(f"  {command}", style="cyan"), Text(f"  # {what}", style="dim")
        # As a shell reads it, so that whole lines can be copied.
        wide = len(line) + len(comment) > console.width
        for part in (comment, line) if wide else (line + comment,):
            console.print(part, soft_wrap=True)
    return status


def header(answers: Answers) -> list[str]:
    """What stands at the top of the recipe."""
    path = answers.output
    return [
        schema_line("recipe", path).rstrip(),
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
    if "eval_strategy" in keys:
        what = f"--data {shlex.quote(answers.data)} --teacher {shlex.quote(answers.teacher)} --measures agreement"
        commands.append((f"mmkd eval {folder} {what}", "how near the student is to the teacher"))
    commands.append((f"mmkd report {folder}", f"curves, tables and samples: {os.path.join(folder, 'report.html')}"))
    return commands


def _summary(draft: Draft, fit: Fit, answers: Answers) -> str:
    keys = draft.keys
    if not fit.fits:
        return f"It does not fit {answers.device.name}: the recipe says what would help."
    rows = keys["per_device_train_batch_size"] + keys.get("unlabeled_batch_size", 0)
    taken = [name for name, key in _SAVINGS.items() if keys.get(key) and key in fit.keys]
    return f"It fits {answers.device.name}, {counted(rows)} at a time{''.join(f', {name}' for name in taken)}."


_SAVINGS = {
    "with activation checkpointing": "activation_checkpointing",
    "a teacher in 4 bits": "teacher_load_in_4bit",
    "a teacher_cache": "teacher_cache",
    "LoRA": "use_peft",
}


def _student_of(answers: Answers) -> str:
    if answers.student is None:
        return f"a student of {answers.keep_layers} of its layers"
    return answers.student
