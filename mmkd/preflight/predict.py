"""What a run would need on devices that are not here: memory of one of them, seconds of a step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from trl.trainer.utils import get_peft_config

from mmkd.errors import UserError
from mmkd.models.backbone import base_of
from mmkd.models.parts import train_only
from mmkd.preparation.supervision import kept
from mmkd.recipe.run import Run
from mmkd.training.config import DistillationConfig

from . import costs
from .count import Passes, count_passes
from .dry_run import at_a_time, logits_of, optimizer_bytes
from .facts import Rendered, Sample, Side
from .hardware import Device

STRATEGIES = ("ddp", "zero2", "zero3", "fsdp2")


@dataclass(frozen=True)
class Shape:
    """The rows of one micro-batch on one device."""

    rows: int
    tokens: int
    """Of a row: the longest that training sees, as rows are padded to it."""
    supervised: float
    """Tokens of a row that are compared, on average."""
    images: float
    data_rows: float
    """Rows of the data in a row: more than one where they are packed."""


@dataclass(frozen=True)
class Model:
    """A student or teacher as a training step sees it."""

    weights: float
    """Bytes, quantised ones as they are stored."""
    trainable: float
    """Parameters."""
    gradients: float
    """Bytes."""
    largest_layer: float
    """Bytes of the block that sharded training gathers at a time: the largest, or the head."""
    width: int
    vocabulary: int
    passes: Passes
    chunks: int = 1
    """Of logits that exist at a time: one for each of several teachers that answer for the same tokens."""


@dataclass(frozen=True)
class Work:
    """All that one micro-batch on one device needs, counted."""

    shape: Shape
    student: Model
    teacher: Model | None
    logits: float
    """Bytes that exist at a time, of student and teacher, with their comparison."""
    head_gradient: float
    optimizer: float
    """Bytes per trainable parameter."""
    checkpointing: bool

    @property
    def loss_flops(self) -> float:
        """Both heads and the gradients of the student's, at supervised positions only.

        Terms on visual tokens or chunks, which some methods add, are not counted.
        """
        tokens = self.shape.rows * self.shape.supervised
        widths = 6 * self.student.width + (0 if self.teacher is None else 2 * self.teacher.width)
        return tokens * self.student.vocabulary * widths

    @property
    def flops(self) -> float:
        passes = self.student.passes
        again = passes.forward if self.checkpointing else 0.0
        teacher = 0.0 if self.teacher is None else self.teacher.passes.forward
        return passes.forward + passes.backward + again + teacher + self.loss_flops

    @property
    def activations(self) -> float:
        """Bytes: all that is saved, or the layers' inputs and what one layer saves when it is computed again."""
        passes = self.student.passes
        return passes.layer_inputs + passes.saved / passes.layers if self.checkpointing else passes.saved


def memory_of(work: Work, strategy: str, devices: int) -> dict[str, float]:
    """Bytes on one device by what they are for: the most that is held at a time, fragments left out."""
    student, teacher = work.student, work.teacher
    weights = devices if strategy in ("zero3", "fsdp2") else 1
    state = 1 if strategy == "ddp" else devices
    parts = {
        "student weights": student.weights / weights,
        "gradients": student.gradients / state,
        "optimizer": work.optimizer * student.trainable / state,
        "teacher weights": 0.0 if teacher is None else teacher.weights / weights,
        "gathered layers": 0.0,
        "activations": work.activations,
        "loss": work.logits + work.head_gradient,
    }
    if weights > 1:
        # The layer that is computed and the one that is fetched meanwhile.
        parts["gathered layers"] = 2 * max(student.largest_layer, 0.0 if teacher is None else teacher.largest_layer)
    return {name: size for name, size in parts.items() if size}


def seconds_of(work: Work, strategy: str, devices: int, accumulation: int, device: Device) -> tuple[float, float]:
    """Seconds that one optimizer step computes, and that it sends; a good run hides the second behind the first."""
    compute = accumulation * work.flops / (device.flops * device.utilisation)
    if devices == 1:
        return compute, 0.0
    share = (devices - 1) / devices
    if strategy in ("zero3", "fsdp2"):
        # Every micro-batch gathers the weights for each pass and scatters the gradients.
        gathers = (3 if work.checkpointing else 2) * work.student.weights
        gathers += 0.0 if work.teacher is None else work.teacher.weights
        sent = accumulation * share * (gathers + work.student.gradients)
    else:
        sent = 2 * share * work.student.gradients
    return compute, sent / device.link


def count_work(run: Run, student: Side, teacher: Model | None, shape: Shape, device_type: str = "cuda") -> Work:
    """Counts a recipe's micro-batch. `teacher` is None when it does not run in the training process."""
    args = run.training
    base = costs.empty_student(run, student, device_type)
    model: Any = base
    if args.trainable is not None:
        train_only(base, args.trainable)
    if (peft := get_peft_config(run.student)) is not None:
        with torch.device("meta"):
            model = get_peft_model(base, peft, low_cpu_mem_usage=True)
    stored = costs.weight_bytes(model, base, costs.bits_of(run.student.load_in_4bit, run.student.load_in_8bit))
    head = base.get_output_embeddings()
    assert head is not None
    head_bytes = float(head.weight.numel() * head.weight.element_size()) if head.weight.requires_grad else 0.0
    bf16, checkpointing = uses_bf16(args, device_type), bool(args.activation_checkpointing)
    ours = facts_of(model, stored, shape, bf16, train=True)
    logits = logits_of(args, ours.vocabulary, 0 if teacher is None else teacher.chunks, device_type)
    return Work(shape, ours, teacher, logits, head_bytes, optimizer_bytes(args), checkpointing)


def count_teacher(run: Run, teacher: Side, shape: Shape, device_type: str = "cuda") -> Model:
    """The teacher's part of a micro-batch: a forward pass over the same rows."""
    empty, stored = costs.empty_teacher(run, teacher, device_type)
    return facts_of(empty, stored, shape, uses_bf16(run.training, device_type), train=False)


def uses_bf16(args: DistillationConfig, device_type: str) -> bool:
    """Whether a run is in bf16 on a device of this kind: what the CPU here only emulates an accelerator has."""
    return bool(args.bf16) or (args.emulated_bf16 and device_type != "cpu")


def together(teachers: Sequence[Model], column: str | None) -> Model | None:
    """Several teachers as one: all on every row, or where a column names theirs each on an equal share of them."""
    if not teachers:
        return None
    share = 1.0 if column is None else 1 / len(teachers)
    passes = replace(teachers[0].passes, forward=share * sum(one.passes.forward for one in teachers))
    return replace(
        teachers[0],
        weights=sum(one.weights for one in teachers),
        largest_layer=max(one.largest_layer for one in teachers),
        width=round(share * sum(one.width for one in teachers)),
        passes=passes,
        chunks=at_a_time(len(teachers), column),
    )


def facts_of(model: Any, stored: float, shape: Shape, bf16: bool, train: bool) -> Model:
    """What a step needs of a model without data, whose weights take `stored` bytes. The model cannot be used again."""
    base = base_of(model)
    trainable = [one for one in model.parameters() if one.requires_grad] if train else []
    head = base.get_output_embeddings()
    assert head is not None
    blocks = [block for module in base.modules() if isinstance(module, nn.ModuleList) for block in module]
    largest = max(*map(_bytes, blocks), _bytes(head))
    gradients = float(sum(one.numel() * one.element_size() for one in trainable))
    parameters = float(sum(one.numel() for one in trainable))
    width, vocabulary = base.config.get_text_config().hidden_size, len(head.weight)
    # Last: counting puts other tensors in the place of the parameters.
    passes = count_passes(model, shape.rows, shape.tokens, shape.images, bf16, train)
    return Model(stored, parameters, gradients, largest, width, vocabulary, passes)


def _bytes(module: nn.Module) -> float:
    return float(sum(one.numel() * one.element_size() for one in module.parameters()))


def shape_of(run: Run, sample: Sample, rendered: Rendered) -> Shape:
    """The rows of a micro-batch, from a sample of the data. Raises UserError when none of its rows can be used."""
    args = run.training
    if not rendered.usable:
        raise UserError("None of the sampled rows can be used, so nothing can be counted. `mmkd doctor` says why.")
    parts = [one.supervised[kept(len(one.ids), args)] for one in rendered.usable]
    tokens, supervised = sum(len(one) for one in parts), sum(int(one.sum()) for one in parts)
    images = 0
    if sample.has_images:
        images = sum(len(row) for row in sample.rows["train"].select_columns("images")["images"])
    per_row = images / len(sample.rows["train"])
    batch = args.per_device_train_batch_size
    if not args.packing:
        return Shape(batch, max(len(one) for one in parts), supervised / len(parts), per_row, 1.0)
    assert args.max_length is not None
    data_rows = args.max_length * len(parts) / tokens
    return Shape(batch, args.max_length, args.max_length * supervised / tokens, per_row * data_rows, data_rows)
