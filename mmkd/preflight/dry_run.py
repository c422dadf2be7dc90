"""What a run would do: parameters, tokens, memory and the first batch, before anything is spent."""

import math
from collections.abc import Mapping

from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmkd.models.backbone import head_of
from mmkd.models.load import tokenizer_of
from mmkd.models.quantised_students import share_of
from mmkd.precision import name_of_dtype
from mmkd.recipe.recipe import Run
from mmkd.recipe.run import build_token_trainer
from mmkd.teachers.local import LocalTeacher
from mmkd.teachers.self_teacher import SelfTeacher
from mmkd.teachers.several import parts_of
from mmkd.training.base import DistillationTrainer
from mmkd.training.method import METHODS
from mmkd.units import readable_size, with_noun

from .estimate import estimate_memory


def dry_run(run: Run, console: Console) -> DistillationTrainer | None:
    """Prints what a run would do, which may write to its output_dir; returns its trainer if it has one over tokens.

    Raises UserError for what training would refuse before its first step.
    """
    own = METHODS[run.arguments.method].dry_run
    if own is not None:
        return own(run, console)
    trainer = build_token_trainer(run)
    report(trainer, estimate_memory(run, longest_row(trainer)), console)
    return trainer


def longest_row(trainer: DistillationTrainer) -> int:
    """Tokens of the longest row of the train data; 0 where rows are packed, or not counted before training."""
    counts = trainer.count_tokens()
    return 0 if counts is None or trainer.args.packing else counts.longest


def report(trainer: DistillationTrainer, memory: Mapping[str, float], console: Console) -> None:
    """Prints the plan of a run: models, data, steps, memory (bytes by what they are for), first batch."""
    table = Table(title=f"mmkd {trainer.method}: dry run", show_header=False)
    for name, value in [*_models(trainer), *_data(trainer)]:
        table.add_row(name, value)
    for name, size in memory.items():
        table.add_row(f"memory: {name}", readable_size(size))
    table.add_row("memory: at least", readable_size(sum(memory.values())))
    console.print(table)
    console.print(render_first_batch(trainer, plain=console.color_system is None or console.no_color))


def render_first_batch(trainer: DistillationTrainer, plain: bool, rows: int = 2, width: int = 1200) -> Text:
    """The text of the first batch; supervised tokens are green, or stand between [[ and ]] where it is plain."""
    batch = next(iter(trainer.get_train_dataloader()))
    tokenizer, text = tokenizer_of(trainer.processing_class), Text()
    for number, (ids, labels) in enumerate(zip(batch["input_ids"][:rows], batch["labels"][:rows], strict=True)):
        text.append(f"\nfirst batch, row {number + 1} of {len(batch['input_ids'])}: ", style="bold")
        start = len(text)
        if "attention_mask" in batch:
            real = batch["attention_mask"][number].bool()
            ids, labels = ids[real], labels[real]
        for token_ids, supervised in runs_of(ids.tolist(), (labels != -100).tolist()):
            piece = str(tokenizer.decode(token_ids))
            marked = f"[[{piece}]]" if supervised and plain else piece
            text.append(marked, style="green" if supervised else "dim")
            if len(text) - start > width:
                text.append(" ...")
                break
    return text


def _models(trainer: DistillationTrainer) -> list[tuple[str, str]]:
    parameters = list(trainer.model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    head = head_of(trainer.model)
    rows = [("student", f"{_count(sum(p.numel() for p in parameters))} parameters, {_count(trainable)} trainable")]
    quantisation = trainer.args.quantisation
    if quantisation is not None:
        rows.append(("quantisation", f"{quantisation.described()}: {share_of(trainer.model, quantisation)}"))
    names = getattr(trainer.teacher, "teachers", [""])
    for name, teacher in zip(names, parts_of(trainer.teacher), strict=True):
        if isinstance(teacher, SelfTeacher):
            rows.append((f"teacher {name}".strip(), teacher.described()))
        elif isinstance(teacher, LocalTeacher):
            weights = list(teacher.model.parameters())
            size = f"{_count(sum(p.numel() for p in weights))} parameters, {name_of_dtype(weights[0].dtype)}"
            rows.append((f"teacher {name}".strip(), size))
    vocabulary = f"{trainer.vocab_size:,} tokens compared"
    padding = len(head.weight) - trainer.vocab_size
    return [*rows, ("vocabulary", vocabulary + (f", {padding:,} padding rows left out" if padding else ""))]


def _data(trainer: DistillationTrainer) -> list[tuple[str, str]]:
    data, args, counts = trainer.train_dataset, trainer.args, trainer.count_tokens()
    if counts is None or not isinstance(data, Dataset):
        return [("data", "streamed; not counted")]
    entries = [("data", f"{counts.size}."), ("length", f"{counts.cutting}.")]
    template = trainer.labelling.template_reports["train"]
    entries += [("template", sentence) for sentence in (*template.warnings, *filter(None, [template.note]))]
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.max_steps if args.max_steps > 0 else math.ceil(math.ceil(len(data) / batch) * args.num_train_epochs)
    # A row of a pack holds several of those that were counted.
    rows = len(data) if args.packing else counts.rows - counts.silent - counts.emptied
    tokens = steps * batch * (counts.supervised - counts.lost_supervised) // max(1, rows)
    return [
        *entries,
        ("steps", f"{with_noun(steps, 'optimizer step')} of {batch} rows, about {tokens:,} tokens"),
    ]


def runs_of(ids: list[int], supervised: list[bool]) -> list[tuple[list[int], bool]]:
    """Consecutive tokens that are all supervised or all not."""
    runs: list[tuple[list[int], bool]] = []
    for token, flag in zip(ids, supervised, strict=True):
        if not runs or runs[-1][1] != flag:
            runs.append(([], flag))
        runs[-1][0].append(token)
    return runs


def _count(number: float) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"
