"""What a run would do: parameters, tokens, memory and the first batch, before anything is spent."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import TrainingArguments

from mmkd.losses.fused import logits_bytes
from mmkd.models.backbone import head_of
from mmkd.models.load import tokenizer_of
from mmkd.recipe.run import Run, build_trainer
from mmkd.teachers.local import LocalTeacher
from mmkd.teachers.several import parts_of
from mmkd.training.base import DistillationTrainer
from mmkd.training.config import DistillationConfig
from mmkd.training.method import METHODS

# Bytes of optimizer state per trainable parameter, by the start of the optimizer's name.
_OPTIMIZER_BYTES = {"adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "adafactor": 0.1, "sgd": 0, "lion": 4}


@dataclass(frozen=True)
class Memory:
    """Bytes on one device while training, without what a framework reserves for itself."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def estimate_memory(trainer: DistillationTrainer) -> Memory:
    """A lower estimate: weights, gradients, optimizer, one chunk of logits per model, and activations.

    Activations are counted as 34 bytes x hidden size per token and layer without gradient checkpointing (Korthikanti
    et al. 2022, attention scores not kept) and as 2 bytes with it.
    """
    args, model = trainer.args, trainer.model
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    text = model.config.get_text_config()
    tokens = args.per_device_train_batch_size * (args.max_length or 1024)
    per_layer = tokens * text.hidden_size * (2 if args.activation_checkpointing else 34)
    parts = {
        "student weights": _bytes(model),
        "gradients": sum(parameter.numel() * parameter.element_size() for parameter in trainable),
        f"optimizer ({_optimizer(args)})": optimizer_bytes(args) * sum(parameter.numel() for parameter in trainable),
        "activations": per_layer * text.num_hidden_layers,
    }
    local = [one.model for one in parts_of(trainer.teacher) if isinstance(one, LocalTeacher)]
    chunks = at_a_time(len(local), getattr(trainer.teacher, "column", None))
    parts["logits of one chunk"] = logits_of(args, trainer.vocab_size, chunks, args.device.type)
    if local:
        parts["teacher weights"] = sum(map(_bytes, local))
    return Memory(parts)


def logits_of(args: DistillationConfig, vocab_size: int, teachers: int, device_type: str) -> int:
    """Bytes of the logits that exist at a time, with so many teachers' beside the student's."""
    return logits_bytes(vocab_size, args.chunk_size, 1 + teachers, args.precise_logits, device_type)


def at_a_time(teachers: int, column: str | None) -> int:
    """How many of so many teachers have logits of one token at a time: all, or where rows name theirs one."""
    return teachers if column is None else min(1, teachers)


def optimizer_bytes(args: TrainingArguments) -> float:
    """Bytes of state that the optimizer of a run keeps per trainable parameter."""
    return next((size for name, size in _OPTIMIZER_BYTES.items() if _optimizer(args).startswith(name)), 8)


def _optimizer(args: TrainingArguments) -> str:
    return str(getattr(args.optim, "value", args.optim))


def dry_run(run: Run, recipe: Path, flags: Sequence[str], console: Console) -> DistillationTrainer | None:
    """Prints what a run would do, which may write to its output_dir; returns its trainer if it has one over tokens.

    Raises UserError for what training would refuse before its first step.
    """
    own = METHODS[run.arguments.method].dry_run
    if own is not None:
        return own(run, recipe, flags, console)
    trainer = build_trainer(run)
    report(trainer, console)
    return trainer


def report(trainer: DistillationTrainer, console: Console) -> None:
    """Prints the plan of a run: models, data, steps, memory, first batch."""
    table = Table(title=f"mmkd {trainer.method}: dry run", show_header=False)
    for name, value in [*_models(trainer), *_data(trainer)]:
        table.add_row(name, value)
    memory = estimate_memory(trainer)
    for name, size in memory.parts.items():
        table.add_row(f"memory: {name}", _size(size))
    table.add_row("memory: at least", _size(memory.total))
    console.print(table)
    console.print(render_first_batch(trainer))


def render_first_batch(trainer: DistillationTrainer, rows: int = 2, width: int = 1200) -> Text:
    """The text of the first batch, supervised tokens in green between [ and ]."""
    batch = next(iter(trainer.get_train_dataloader()))
    tokenizer, text = tokenizer_of(trainer.processing_class), Text()
    for number, (ids, labels) in enumerate(zip(batch["input_ids"][:rows], batch["labels"][:rows], strict=True)):
        text.append(f"\nfirst batch, row {number + 1} of {len(batch['input_ids'])}: ", style="bold")
        start = len(text)
        for token_ids, supervised in _runs(ids.tolist(), (labels != -100).tolist()):
            piece = str(tokenizer.decode(token_ids))
            text.append(f"[{piece}]" if supervised else piece, style="green" if supervised else "dim")
            if len(text) - start > width:
                text.append(" ...")
                break
    return text


def _models(trainer: DistillationTrainer) -> list[tuple[str, str]]:
    parameters = list(trainer.model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    head = head_of(trainer.model)
    rows = [("student", f"{_count(sum(p.numel() for p in parameters))} parameters, {_count(trainable)} trainable")]
    names = getattr(trainer.teacher, "teachers", [""])
    for name, teacher in zip(names, parts_of(trainer.teacher), strict=True):
        if isinstance(teacher, LocalTeacher):
            weights = list(teacher.model.parameters())
            size = f"{_count(sum(p.numel() for p in weights))} parameters, {weights[0].dtype}"
            rows.append((f"teacher {name}".strip(), size))
    vocabulary = f"{trainer.vocab_size:,} tokens compared"
    padding = len(head.weight) - trainer.vocab_size
    return [*rows, ("vocabulary", vocabulary + (f", {padding:,} padding rows left out" if padding else ""))]


def _data(trainer: DistillationTrainer) -> list[tuple[str, str]]:
    data, args, counts = trainer.train_dataset, trainer.args, trainer.count_tokens()
    if counts is None or not isinstance(data, Dataset):
        return [("data", "streamed; not counted")]
    told = [("data", f"{counts.size}."), ("length", f"{counts.cutting}.")]
    template = trainer.labelling.template_reports["train"]
    told += [("template", said) for said in (*template.warnings, *filter(None, [template.note]))]
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.max_steps if args.max_steps > 0 else math.ceil(math.ceil(len(data) / batch) * args.num_train_epochs)
    # A row of a pack holds several of those that were counted.
    rows = len(data) if args.packing else counts.rows - counts.silent - counts.emptied
    tokens = steps * batch * (counts.supervised - counts.lost_supervised) // max(1, rows)
    return [*told, ("steps", f"{steps:,} optimizer steps of {batch} rows, about {tokens:,} tokens")]


def _runs(ids: list[int], supervised: list[bool]) -> list[tuple[list[int], bool]]:
    runs: list[tuple[list[int], bool]] = []
    for token, flag in zip(ids, supervised, strict=True):
        if not runs or runs[-1][1] != flag:
            runs.append(([], flag))
        runs[-1][0].append(token)
    return runs


def _bytes(model: nn.Module) -> float:
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _count(number: float) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def _size(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
