"""`mmkd plan` and `--dry_run` of method tower_kd: a student tower on one batch, beside its teachers."""

import math
from typing import Any

import torch
from accelerate import init_empty_weights
from rich.console import Console
from rich.table import Table

from mmkd.models.vision_towers import image_side, new_tower, tower_config
from mmkd.preflight.count import counted
from mmkd.preflight.hardware import Device
from mmkd.preflight.stage_checks import StageRun
from mmkd.preflight.whole_model import WholePlan, training_pass, training_state
from mmkd.recipe.recipe import Run
from mmkd.seams.torch_seam import without_data
from mmkd.units import readable_size, with_noun

from .tower_build import build_tower_trainer, pictures_of
from .tower_checks import empty_tower
from .tower_config import TowerKDConfig
from .tower_run import check_arguments, role_of, settings_of, student_config, teacher_runs
from .tower_trainer import TowerKDTrainer


def plan_tower(stage: StageRun, device: Device, devices: int, price: float | None, console: Console) -> int:
    """Prints the plan of a run of towers; returns 0 when it fits one device, 1 when it does not.

    Weights, gradients, optimizer and teachers are on every device, as with accelerate_config ddp.
    """
    run: Any = stage.run
    args = settings_of(run)
    check_arguments(run)
    batch, pictures = args.per_device_train_batch_size, len(pictures_of(run).train)
    config, student = student_config(run), empty_tower(run)
    state = training_state(student, args)  # pyright: ignore[reportArgumentType]
    flops, saved = training_pass(student, {"pixel_values": _shape(config, batch)}, bool(args.bf16))
    parts, asked = {**state, "activations": saved}, 0.0
    for name, (own, _) in teacher_runs(run).items():
        weights, pass_flops = _teacher(own, batch)
        parts[role_of(name)], asked = weights, asked + pass_flops
    seconds = (flops + asked) * args.gradient_accumulation_steps / (device.flops * device.utilisation)
    of_teachers = {"of it for teachers": f"{asked / (flops + asked):.0%}"}
    steps = _steps(args, pictures, devices)
    plan = WholePlan(parts, seconds, steps, left_out=", without the heads", of_step=of_teachers)
    return plan.show(stage.title, f"{batch} pictures each", device, devices, price, console)


def dry_run_tower(run: Run, console: Console) -> TowerKDTrainer:
    """Prints what a run would do: towers, pictures, terms and steps -> its trainer."""
    trainer = build_tower_trainer(run)
    args = trainer.args
    held_out: Any = trainer.eval_dataset
    table = Table(title="mmkd tower_kd: dry run", show_header=False)
    table.add_row("student", _described(trainer.model, trainer.student_layer))
    for name, tower in trainer.towers.items():
        share = f", {trainer.shares[name]:.0%} of the loss" if len(trainer.towers) > 1 else ""
        table.add_row(role_of(name), _described(tower, trainer.teacher_layer) + share)
    rows: Any = trainer.train_dataset
    table.add_row("pictures", f"{len(rows):,} to learn, {len(held_out) if held_out else 0:,} to measure on")
    terms = [f"{name} {weight:g}" for name, weight in args.term_weights.items() if weight]
    table.add_row("terms", f"{', '.join(terms)}; features scaled by {args.normalize_features}")
    steps = _steps(args, len(rows), args.world_size)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    table.add_row("steps", f"{with_noun(steps, 'optimizer step')} of {batch} pictures")
    table.add_row("memory: student and optimizer", readable_size(sum(training_state(trainer.model, args).values())))
    console.print(table)
    return trainer


def _described(tower: Any, layer: int | None) -> str:
    count = sum(parameter.numel() for name, parameter in tower.named_parameters() if "distillation_heads" not in name)
    read = "its output" if layer is None else f"hidden layer {layer}"
    side = image_side(tower.config)
    return f"{tower.config.model_type}, {count / 1e6:.2f} M parameters, {side} x {side} pixels, {read}"


def _shape(config: Any, batch: int) -> tuple[int, int, int, int]:
    side = image_side(config)
    return (batch, getattr(config, "num_channels", 3), side, side)


def _teacher(run: Run, batch: int) -> tuple[float, float]:
    """Bytes of a teacher's weights, and the FLOPs of its pass over a batch."""
    arguments, hub = run.arguments, run.hub(run.arguments.teacher_revision)
    config = tower_config(str(arguments.teacher), "teacher", **hub)
    with init_empty_weights(include_buffers=False):
        tower = new_tower(config)
    dtype = arguments.teacher_dtype if arguments.teacher_dtype != "auto" else config.dtype or torch.float32
    size = (getattr(torch, dtype) if isinstance(dtype, str) else dtype).itemsize
    weights = float(sum(parameter.numel() for parameter in tower.parameters()) * size)
    with without_data(), torch.no_grad():
        tower.to_empty(device="cpu")
        return weights, counted(lambda: tower(pixel_values=torch.zeros(_shape(config, batch))))[1]


def _steps(args: TowerKDConfig, pictures: int, devices: int) -> int:
    """Optimizer steps of the run."""
    if args.max_steps > 0:
        return args.max_steps
    batches = math.ceil(pictures / (args.per_device_train_batch_size * devices))
    return math.ceil(math.ceil(batches / args.gradient_accumulation_steps) * args.num_train_epochs)
