"""Checks of `mmkd doctor` on a recipe of method comd: its roles, prompts, instructions and budget."""

import tempfile
from pathlib import Path

from mmkd.preflight.book import Book
from mmkd.preflight.doctor import examine_tokens
from mmkd.preflight.facts import Finding, Sample
from mmkd.recipe.recipe import Run

from .comd_checks import check_rounds
from .comd_prompts import Prompts
from .comd_trainer import CoMDConfig
from .instructions import ImageStore, read_instructions
from .roles import Roles


def examine_rounds(run: Run, sharded: bool) -> list[Finding]:
    """What all checks found: those of a training over tokens, as each round is one, and those of the loop."""

    def of_the_loop(book: Book, sample: Sample | None) -> None:
        book.check("roles", roles, run)
        if sample is not None:
            book.check("budget", budget, sample, run)
            if sample.assumed_answer is not None:
                text = f"The rows are prompts only. The checks assume answers of {sample.assumed_answer} tokens."
                book.findings.append(Finding("ok", "answers", text))

    return examine_tokens(run, sharded, of_the_loop)


def roles(run: Run) -> list[Finding]:
    """Who plays which role. Raises UserError for roles, prompts and settings that training would refuse."""
    training = run.training
    assert isinstance(training, CoMDConfig)
    check_rounds(run)
    Roles(run).close()
    Prompts.read(training.prompts)
    arguments = run.arguments
    teacher = arguments.teacher if arguments.teacher_server is None else ", ".join(arguments.teacher_server)
    text = f"{teacher} answers; assessor {training.assessor}, augmentor {training.augmentor}; rounds 0 to "
    return [Finding("ok", "roles", f"{text}{training.rounds}, each trained with {training.round_method}.")]


def budget(sample: Sample, run: Run) -> list[Finding]:
    """What is asked at most. Raises UserError for rows that ask nothing."""
    training = run.training
    assert isinstance(training, CoMDConfig)
    with tempfile.TemporaryDirectory() as scratch:
        usable = len(read_instructions(sample.rows["train"], ImageStore(Path(scratch))))
    made = training.rounds * training.new_instructions if training.augmentor != "none" else 0
    made = min(made, training.max_new_instructions or made)
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    total = sample.totals["train"]
    if total is not None and total < batch:
        text = f"{total} instructions are fewer than a batch of {batch}: round 0 would be refused."
        return [Finding("problem", "budget", text, "Give more data, or lower per_device_train_batch_size.")]
    asked = "the data's instructions" if total is None else f"up to {total:,} instructions"
    longest = "" if total is None else f", at most {(total + made) * training.answer_max_new_tokens:,} tokens"
    limit = training.max_teacher_tokens
    cap = "max_teacher_tokens sets no limit" if limit is None else f"max_teacher_tokens stops at {limit:,}"
    text = f"The teacher answers {asked} and {made:,} new ones{longest}; {cap}. {usable} in the sample can be asked."
    return [Finding("ok", "budget", text)]
