"""`mmkd plan` for recipes of method dho: a student of classes on one batch, and its teacher once over all rows."""

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import init_empty_weights
from rich.console import Console
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from mmkd.data.class_rows import ClassRows, SemiSupervisedSampler
from mmkd.preflight.count import counted
from mmkd.preflight.hardware import Device
from mmkd.preflight.stage_checks import StageRun
from mmkd.preflight.whole_model import WholePlan, training_pass, training_state
from mmkd.recipe.recipe import Run
from mmkd.seams.torch_seam import without_data
from mmkd.teachers.classifiers import OPEN_CLIP

from .class_checks import empty_class_student
from .class_run import Classes, check_arguments, load_classes, settings_of
from .class_teacher import runs_of_teachers
from .dho_build import student_processor
from .dho_config import DHOConfig


def plan_classes(stage: StageRun, device: Device, devices: int, price: float | None, console: Console) -> int:
    """Prints the plan of a run of classes; returns 0 when it fits one device, 1 when it does not.

    Weights, gradients and optimizer are on every device, as with accelerate_config ddp.
    """
    run: Any = stage.run
    args: DHOConfig = run.training
    check_arguments(run)
    classes = load_classes(run)
    unlabeled = args.unlabeled_batch_size if args.asks_teacher else 0
    batch = args.per_device_train_batch_size + unlabeled
    student = empty_class_student(run, classes)
    state = training_state(student, args)
    flops, saved = training_pass(student, _inputs(run, classes, batch), bool(args.bf16))
    parts = {**state, "activations": saved}
    steps, rows = _steps(args, classes, devices), len(classes.rows)
    seconds = flops * args.gradient_accumulation_steps / (device.flops * device.utilisation)
    once, asked = 0.0, dict[str, str]()
    for name, part in runs_of_teachers(run).items():
        teacher = _teacher_flops(part, classes)
        own = 0.0 if teacher is None else rows * teacher / (device.flops * device.utilisation) / 3600
        once += own
        if args.asks_teacher and part.arguments.teacher is not None:
            kind = settings_of(part).teacher_kind
            answering = f"{own:,.3g}" if teacher is not None else f"not counted for teacher_kind {kind}"
            who = f"teacher {name}" if name else "the teacher"
            asked[f"device-hours of {who}, once over {rows:,} rows"] = answering
    step_flops = f"{args.gradient_accumulation_steps * devices * flops / 1e12:,.3g}"
    plan = WholePlan(
        parts, seconds, steps, first={"TFLOPs per optimizer step": step_flops}, once=asked, hours_once=once
    )
    return plan.show(stage.title, f"{batch} rows on each", device, devices, price, console)


def _inputs(run: Run, classes: Classes, batch: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a batch of rows like the first one."""
    args: Any = run.training
    rows = ClassRows(classes.rows.dataset, student_processor(run, classes.is_text), max_length=args.max_length)
    first = rows[0]
    if classes.is_text:
        return {"input_ids": (batch, len(first["input_ids"]))}
    return {"pixel_values": (batch, *first["pixel_values"].shape)}


def _teacher_flops(run: Run, classes: Classes) -> float | None:
    """FLOPs of a teacher's pass over one row; None for one that is not counted."""
    args: Any = run.training
    name, hub = run.arguments.teacher, run.hub(run.arguments.teacher_revision)
    if not args.asks_teacher or name is None or classes.is_text or name.startswith(OPEN_CLIP):
        return None
    if args.teacher_kind == "question":
        return None
    classifier = args.teacher_kind in ("classifier", "masked")
    auto_class: Any = AutoModelForImageClassification if classifier else AutoModel
    with init_empty_weights(include_buffers=False):
        model = auto_class.from_config(AutoConfig.from_pretrained(name, **hub))
    pixels = AutoImageProcessor.from_pretrained(name, **hub)(images=classes.rows.raw(0), return_tensors="pt")
    ask: Callable[..., Any] = model if classifier else model.get_image_features
    with without_data(), torch.no_grad():
        model.to_empty(device="cpu")
        return counted(lambda: ask(pixel_values=torch.zeros(tuple(pixels["pixel_values"].shape))))[1]


def _steps(args: DHOConfig, classes: Classes, devices: int) -> int:
    """Optimizer steps of the run: an epoch is a pass over the unlabelled rows."""
    if args.max_steps > 0:
        return args.max_steps
    shown = args.shown_labels(classes.rows.labels, classes.data.class_names)
    sampler = SemiSupervisedSampler(shown, args.per_device_train_batch_size, args.unlabeled_batch_size, args.seed)
    an_epoch = math.ceil(sampler.batches / (devices * args.gradient_accumulation_steps))
    return math.ceil(an_epoch * args.num_train_epochs)
