"""What a training step takes, from configs and a sample of rows: the one estimate that all commands show a part of."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames
from trl.trainer.utils import get_peft_config

from mmkd.errors import UserError
from mmkd.losses.projection import logits_bytes
from mmkd.models.backbone import base_of
from mmkd.models.parts import train_only
from mmkd.models.quantised_students import quantise_forward
from mmkd.preparation.supervision import kept
from mmkd.recipe.recipe import Run
from mmkd.recipe.run_teacher import reads_teacher
from mmkd.training.config import DistillationConfig

from .count import ImageCounts, Passes, count_passes
from .empty_models import bits_of, empty_student, empty_teacher, weight_bytes
from .facts import Rendered, Sample, Side, render, student_side, take_sample, teacher_side

# Bytes of optimizer state per trainable parameter, by the start of the optimizer's name.
_OPTIMIZER_BYTES = {"adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "adafactor": 0.1, "sgd": 0, "lion": 4}

Loaded = Sequence[tuple[Run, Side]]
"""The teachers that are loaded to train, each with the run of it alone."""


@dataclass(frozen=True)
class Shape:
    """The rows of one micro-batch on one device."""

    rows: int
    tokens: int
    """Of a row: the longest that training sees, as rows are padded to it."""
    supervised: float
    """Tokens of a row that are compared, on average."""
    images: float
    image_tokens: float
    data_rows: float
    """Rows of the data in a row: more than one where they are packed."""


@dataclass(frozen=True)
class ModelCosts:
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
    student: ModelCosts
    teacher: ModelCosts | None
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
        teacher = 0.0 if self.teacher is None else self.teacher.passes.forward + self.teacher.passes.backward
        return passes.forward + passes.backward + again + teacher + self.loss_flops

    @property
    def activations(self) -> float:
        """Bytes: all that is saved, or the layers' inputs and what one layer saves when it is computed again.

        Of a teacher all that is saved, if a gradient goes through it.
        """
        passes = self.student.passes
        own = passes.layer_inputs + passes.saved / passes.layers if self.checkpointing else passes.saved
        return own + (0.0 if self.teacher is None else self.teacher.passes.saved)


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


def estimate_memory(run: Run, longest: int = 0) -> dict[str, float]:
    """`memory_estimate` of a run on the device here; `longest` row of all, of which the estimate draws a sample.

    Raises UserError for what cannot be loaded.
    """
    student, sample = student_side(run), take_sample(run)
    loaded = [alone for alone in run.by_teacher().values() if reads_teacher(alone.arguments)]
    teachers = [(alone, teacher_side(alone)) for alone in loaded if alone.arguments.teacher is not None]
    shape = shape_of(run, sample, render(run, student, sample))
    shape = replace(shape, tokens=max(shape.tokens, len(range(longest)[kept(longest, run.training)])))
    return memory_estimate(run, student, teachers, shape, run.training.device.type)


def memory_estimate(run: Run, student: Side, teachers: Loaded, shape: Shape, device_type: str) -> dict[str, float]:
    """Bytes on one device by what they are for, where nothing is sharded."""
    models = [count_teacher(alone, side, shape, device_type, flops=False) for alone, side in teachers]
    teacher = together(models, run.arguments.teacher_column)
    return memory_of(count_work(run, student, teacher, shape, device_type, flops=False), "ddp", 1)


def count_work(
    run: Run, student: Side, teacher: ModelCosts | None, shape: Shape, device_type: str = "cuda", flops: bool = True
) -> Work:
    """Counts a recipe's micro-batch. `teacher` is None when it does not run in the training process."""
    args = run.training
    model = _trained(run, student, device_type)
    base = base_of(model)
    stored = weight_bytes(model, base, bits_of(run.student.load_in_4bit, run.student.load_in_8bit))
    head = base.get_output_embeddings()
    assert head is not None
    head_bytes = float(head.weight.numel() * head.weight.element_size()) if head.weight.requires_grad else 0.0
    bf16, checkpointing = uses_bf16(args, device_type), bool(args.activation_checkpointing)
    ours = facts_of(model, stored, shape, bf16, train=True, flops=flops)
    logits = logits_of(args, ours.vocabulary, 0 if teacher is None else teacher.chunks, device_type)
    return Work(shape, ours, teacher, logits, head_bytes, optimizer_bytes(args), checkpointing)


def _trained(run: Run, student: Side, device_type: str) -> Any:
    """The student without data, with its adapter, in which only what is trained has gradients."""
    base = empty_student(run, student, device_type)
    if run.training.trainable is not None:
        train_only(base, run.training.trainable)
    model: Any = base
    if (peft := get_peft_config(run.student)) is not None:
        with torch.device("meta"):
            model = get_peft_model(base, peft, low_cpu_mem_usage=True)
    if run.training.quantisation is not None:
        # What is rounded is kept for the backward pass, and counted with the activations.
        quantise_forward(model, run.training.quantisation)
    return model


def count_teacher(run: Run, teacher: Side, shape: Shape, device_type: str = "cuda", flops: bool = True) -> ModelCosts:
    """The teacher's part of a micro-batch: a forward pass over the same rows, and a second one with its backward pass
    if a gradient goes through the teacher.

    Of a student that teaches itself the weights are the copies that it keeps of some.
    """
    if run.itself and reads_teacher(run.arguments):
        empty: Any = _trained(run, student_side(run), device_type)
        stored = _kept_bytes(run, empty)
    else:
        empty, stored = empty_teacher(run, teacher, device_type)
    bf16, again = uses_bf16(run.training, device_type), run.training.differentiates_teacher
    counted = facts_of(empty.requires_grad_(False), stored, shape, bf16, train=again, flops=flops)
    passes = counted.passes
    return replace(counted, passes=replace(passes, forward=2 * passes.forward)) if again else counted


def _kept_bytes(run: Run, student: Any) -> float:
    """Bytes of the copies that a student keeps to teach itself; averages are in float32 or wider."""
    form = run.training.self_teacher or "base"
    if form == "live" or (form == "base" and run.student.use_peft):
        return 0.0
    smallest = 4 if form == "ema" else 0
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    return float(sum(parameter.numel() * max(smallest, parameter.element_size()) for parameter in trained))


def uses_bf16(args: DistillationConfig, device_type: str) -> bool:
    """Whether a run is in bf16 on a device of this kind: what the CPU here only emulates an accelerator has."""
    return bool(args.bf16) or (args.emulated_bf16 and device_type != "cpu")


def together(teachers: Sequence[ModelCosts], column: str | None) -> ModelCosts | None:
    """Several teachers as one: all on every row, or where a column names theirs each on an equal share of them."""
    if not teachers:
        return None
    share = 1.0 if column is None else 1 / len(teachers)
    passes = replace(
        teachers[0].passes,
        **{
            name: share * sum(getattr(teacher.passes, name) for teacher in teachers)
            for name in ("forward", "backward", "saved")
        },
    )
    return replace(
        teachers[0],
        weights=sum(teacher.weights for teacher in teachers),
        largest_layer=max(teacher.largest_layer for teacher in teachers),
        width=round(share * sum(teacher.width for teacher in teachers)),
        passes=passes,
        chunks=at_a_time(len(teachers), column),
    )


def facts_of(model: Any, stored: float, shape: Shape, bf16: bool, train: bool, flops: bool = True) -> ModelCosts:
    """What a step needs of a model without data, whose weights take `stored` bytes. The model cannot be used again.

    Without `flops`, which take the longer part of the time, those of its passes are 0.
    """
    base = base_of(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad] if train else []
    head = base.get_output_embeddings()
    assert head is not None
    blocks = [block for module in base.modules() if isinstance(module, nn.ModuleList) for block in module]
    largest = max(*map(_bytes, blocks), _bytes(head))
    gradients = float(sum(parameter.numel() * parameter.element_size() for parameter in trainable))
    parameters = float(sum(parameter.numel() for parameter in trainable))
    width, vocabulary = base.config.get_text_config().hidden_size, len(head.weight)
    # Last: counting puts other tensors in the place of the parameters.
    pictures = ImageCounts(shape.rows * shape.images, shape.rows * shape.image_tokens)
    passes = count_passes(model, shape.rows, shape.tokens, pictures, bf16, train, flops)
    return ModelCosts(stored, parameters, gradients, largest, width, vocabulary, passes)


def _bytes(module: nn.Module) -> float:
    return float(sum(parameter.numel() * parameter.element_size() for parameter in module.parameters()))


def shape_of(run: Run, sample: Sample, rendered: Rendered) -> Shape:
    """The rows of a micro-batch, from a sample of the data. Raises UserError when none of its rows can be used."""
    args = run.training
    if not rendered.usable:
        raise UserError("None of the sampled rows can be used, so nothing can be counted. `mmkd doctor` says why.")
    parts = [row.supervised[kept(len(row.ids), args)] for row in rendered.usable]
    tokens, supervised = sum(len(part) for part in parts), sum(int(part.sum()) for part in parts)
    images = 0
    if sample.has_images:
        images = sum(len(row) for row in sample.rows["train"].select_columns("images")["images"])
    per_row = images / len(sample.rows["train"])
    image_tokens = sum(int((sequence.ids == rendered.image_token).sum()) for sequence in rendered.usable) / len(parts)
    batch = args.per_device_train_batch_size
    if not args.packing:
        longest = max(len(part) for part in parts)
        return Shape(batch, longest, supervised / len(parts), per_row, image_tokens, 1.0)
    assert args.max_length is not None
    rows = args.max_length * len(parts) / tokens
    return Shape(
        batch, args.max_length, args.max_length * supervised / tokens, per_row * rows, image_tokens * rows, rows
    )


def logits_of(args: DistillationConfig, vocab_size: int, teachers: int, device_type: str) -> int:
    """Bytes of the logits that exist at a time, with so many teachers' beside the student's."""
    return logits_bytes(vocab_size, args.chunk_size, 1 + teachers, args.precise_logits, device_type)


def at_a_time(teachers: int, column: str | None) -> int:
    """How many of so many teachers have logits of one token at a time: all, or where rows name theirs one."""
    return teachers if column is None else min(1, teachers)


def optimizer_bytes(args: TrainingArguments) -> float:
    """Bytes of state that the optimizer of a run keeps per trainable parameter."""
    name = str(args.optim.value if isinstance(args.optim, OptimizerNames) else args.optim)
    return next((size for start, size in _OPTIMIZER_BYTES.items() if name.startswith(start)), 8)
