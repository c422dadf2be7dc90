"""`mmkd plan` and `--dry_run` of method clip_kd: a student on one part of a batch, beside its teachers."""

import math
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from mmkd.models.dual_encoder import TransformersDualEncoder, encoder_config, encoder_processor, kind_of_encoder
from mmkd.preflight.count import counted
from mmkd.preflight.hardware import Device
from mmkd.preflight.stage_checks import StageRun
from mmkd.preflight.whole_model import WholePlan, training_pass, training_state, zeros_of
from mmkd.recipe.recipe import Run
from mmkd.seams.torch_seam import without_data
from mmkd.units import readable_size, with_noun

from .clip_build import build_clip_trainer
from .clip_checks import described_encoder
from .clip_config import ContrastiveKDConfig
from .clip_run import (
    check_arguments,
    empty_model,
    empty_student,
    pairs_of,
    role_of,
    settings_of,
    student_hub,
    student_name,
    teacher_runs,
)
from .clip_trainer import ContrastiveKDTrainer


def plan_clip(stage: StageRun, device: Device, devices: int, price: float | None, console: Console) -> int:
    """Prints the plan of a run of pairs; returns 0 when it fits one device, 1 when it does not.

    Weights, gradients, optimizer and teachers are on every device, as with accelerate_config ddp. Activations are
    those of per_device_train_batch_size pairs, however many a step has.
    """
    run: Any = stage.run
    args = settings_of(run)
    check_arguments(run)
    batch, pairs = args.per_device_train_batch_size, len(pairs_of(run)[0])
    name, hub, student = student_name(run), student_hub(run), empty_student(run)
    state = training_state(student, args)
    flops, saved = training_pass(student, _shapes(name, "student", batch, **hub), bool(args.bf16))
    parts, asked = {**state, "activations": saved}, 0.0
    for teacher, (own, _) in teacher_runs(run).items():
        if own.arguments.teacher_cache is not None:
            continue
        weights, pass_flops = _teacher(own, teacher, batch)
        parts[role_of(teacher)], asked = weights, asked + pass_flops
    # Parts of a batch are embedded once more, and a forward pass is a third of the work.
    again = 4 / 3 if args.gradient_accumulation_steps > 1 else 1.0
    work = (flops * again + asked) * args.gradient_accumulation_steps
    seconds, steps = work / (device.flops * device.utilisation), _steps(args, pairs, devices)
    plan = WholePlan(
        parts,
        seconds,
        steps,
        left_out=", without projectors and similarities",
        first={"pairs of a step": f"{batch * args.gradient_accumulation_steps * devices:,}"},
        of_step={"of it for teachers": f"{asked / (flops * again + asked):.0%}"},
    )
    return plan.show(stage.title, f"{batch} pairs each", device, devices, price, console)


def dry_run_clip(run: Run, console: Console) -> ContrastiveKDTrainer:
    """Prints what a run would do: encoders, pairs, terms and steps -> its trainer."""
    trainer = build_clip_trainer(run)
    args, rows, held_out = trainer.args, trainer.train_dataset, trainer.eval_dataset
    table = Table(title="mmkd clip_kd: dry run", show_header=False)
    table.add_row("student", described_encoder(trainer.student))
    for name, teacher in trainer.teachers.items():
        share = f", {trainer.shares[name]:.0%} of the loss" if len(trainer.teachers) > 1 else ""
        table.add_row(role_of(name), described_encoder(teacher) + share)
    measured: Any = held_out
    kind = "pictures with captions" if rows.has_images else "pairs of texts"
    table.add_row(kind, f"{len(rows):,} to learn, {len(measured) if measured else 0:,} to measure on")
    table.add_row("terms", ", ".join(f"{name} {weight:g}" for name, weight in trainer.weights.items() if weight))
    steps = _steps(args, len(rows), args.world_size)
    table.add_row("steps", f"{with_noun(steps, 'optimizer step')} of {trainer.pairs_per_step:,} pairs")
    table.add_row("memory: student and optimizer", readable_size(sum(training_state(trainer.model, args).values())))
    console.print(table)
    return trainer


def _shapes(name: str, role: str, batch: int, **hub: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of what an encoder reads of so many pairs of the longest texts."""
    kind = kind_of_encoder(name, **hub)
    if kind != "transformers":
        return {"input_ids": (2 * batch, 128)}
    encoder_config(name, role, **hub)
    model = empty_model(name, role, **hub)
    encoder = TransformersDualEncoder(model, encoder_processor(name, role, **hub), name)
    pixels = encoder.prepare_images([Image.new("RGB", (96, 96))])["pixel_values"]
    texts = encoder.prepare_texts(["a " * 1000])["input_ids"]
    return {"pixel_values": (batch, *pixels.shape[1:]), "input_ids": (batch, texts.shape[1])}


def _teacher(own: Run, name: str, batch: int) -> tuple[float, float]:
    """Bytes of a teacher's weights, and the FLOPs of its pass over a part of a batch."""
    arguments, hub = own.arguments, own.hub(own.arguments.teacher_revision)
    model = empty_model(str(arguments.teacher), role_of(name), **hub)
    named = arguments.teacher_dtype if arguments.teacher_dtype != "auto" else model.config.dtype or torch.float32
    size = (getattr(torch, named) if isinstance(named, str) else named).itemsize
    weights = float(sum(parameter.numel() for parameter in model.parameters()) * size)
    shapes = _shapes(str(arguments.teacher), role_of(name), batch, **hub)
    with without_data(), torch.no_grad():
        model.to_empty(device="cpu")
        return weights, counted(lambda: model(**zeros_of(shapes)))[1]


def _steps(args: ContrastiveKDConfig, pairs: int, devices: int) -> int:
    """Optimizer steps of the run; what is no whole batch is left out of an epoch."""
    if args.max_steps > 0:
        return args.max_steps
    whole = pairs // (args.per_device_train_batch_size * args.gradient_accumulation_steps * devices)
    return math.ceil(whole * args.num_train_epochs)
