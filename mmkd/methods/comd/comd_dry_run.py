"""What a run of comd would do, before anything is asked or trained."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmkd.preflight.dry_run import longest_row, report
from mmkd.preflight.estimate import estimate_memory
from mmkd.recipe.recipe import Run
from mmkd.recipe.run import build_token_trainer, load_rows_of
from mmkd.training.base import DistillationTrainer

from . import round_recipes as recipes
from .comd_prompts import Prompts
from .comd_trainer import CoMDConfig
from .instructions import ImageStore, apart_from, read_instructions, row_of
from .roles import Roles
from .round_files import write_lines


def dry_run_comd(run: Run, console: Console) -> DistillationTrainer:
    """Prints the plan of all rounds, and that of training round 0, on the data's own answers in place of a teacher's.

    Returns the trainer of round 0. Raises UserError for what the loop would refuse before its first question.
    """
    folder = Path(run.training.output_dir or "")
    training = run.training
    assert isinstance(training, CoMDConfig)
    Roles(run)
    Prompts.read(training.prompts)
    store, data = ImageStore(folder / "images"), load_rows_of(run)
    held_out = read_instructions(data["eval"], store) if "eval" in data else []
    seeds = apart_from(read_instructions(data["train"], store), held_out)
    arguments = run.arguments
    teacher = arguments.teacher if arguments.teacher_server is None else ", ".join(arguments.teacher_server)
    made = training.rounds * training.new_instructions
    made = min(made, training.max_new_instructions or made) if training.augmentor != "none" else 0
    table = Table(title="mmkd comd: dry run", show_header=False)
    table.add_row("instructions", f"{len(seeds):,} of the data, {len(held_out):,} held out")
    table.add_row("rounds", f"0 to {training.rounds}, each trained with {training.round_method}")
    table.add_row("new instructions", f"up to {made:,}, {training.hard_ratio:.0%} of them from hard ones")
    table.add_row("teacher", str(teacher))
    for role in ("assessor", "augmentor"):
        kind = getattr(training, role)
        named = getattr(training, f"{role}_server") or getattr(training, f"{role}_model") or "the teacher"
        table.add_row(role, f"{kind}, {named}" if kind in ("judge", "model") else kind)
    longest = (len(seeds) + made) * training.answer_max_new_tokens
    budget = f"{training.max_teacher_tokens:,}" if training.max_teacher_tokens else "unlimited"
    table.add_row("teacher's answers", f"at most {longest:,} tokens, budget {budget}")
    console.print(table)
    write_lines(folder / "pool.jsonl", [row_of(instruction, instruction.reference or "?") for instruction in seeds])
    recipes.write_data(folder, any(instruction.images for instruction in seeds), None)
    first = recipes.write_round(run, folder, recipes.student_keys(run), 0).parse()
    trainer = build_token_trainer(first)
    report(trainer, estimate_memory(first, longest_row(trainer)), console)
    return trainer
