"""Student and teachers of a run as models without weights, as they would be loaded, and the bytes that those take."""

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from mmkd.precision import product_dtype
from mmkd.recipe.recipe import Run
from mmkd.recipe.run_pruning import empty_pruned

from .facts import Side

# Besides the value itself a group of 64 quantised weights shares a scale of 32 bits.
SCALE_BITS = 0.5


def empty_student(run: Run, student: Side, device: str | torch.device | None = None) -> PreTrainedModel:
    """The student without weights, cut as the recipe asks, in the type that it has on `device` (the run's own).

    Raises UserError for sizes that cannot be.
    """
    device = device or run.training.device
    # A student with fresh weights has the type of no file.
    saved = None if run.arguments.student_init == "random" else student.config.dtype
    model = _empty(student.config, _dtype(run.student.dtype, saved, device), run)
    if run.arguments.student_init != "prune":
        return model
    return empty_pruned(run, model)


def weight_bytes(model: nn.Module, base: PreTrainedModel, bits: int | None) -> float:
    """Bytes of all weights; linear layers besides the head in `bits` each where they are quantised."""
    head = base.get_output_embeddings()
    quantised: set[int] = set()
    if bits is not None:
        linear = [module for module in base.modules() if isinstance(module, nn.Linear) and module is not head]
        quantised = {id(module.weight) for module in linear if not module.weight.requires_grad or model is base}
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    return sum(
        tensor.numel() * (((bits or 0) + SCALE_BITS) / 8 if id(tensor) in quantised else tensor.element_size())
        for tensor in tensors
    )


def empty_teacher(run: Run, teacher: Side, device: str | torch.device | None = None) -> tuple[PreTrainedModel, float]:
    """The teacher without weights, and the bytes that they take once they are loaded on `device` (the run's own)."""
    arguments, folder = run.arguments, Path(teacher.name)
    device = device or run.training.device
    model = _empty(teacher.config, _dtype(arguments.teacher_dtype, teacher.config.dtype, device), run)
    if "quantization_config" in teacher.config.to_dict() and folder.is_dir():
        return model, sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    bits = bits_of(arguments.teacher_load_in_4bit, arguments.teacher_load_in_8bit)
    return model, weight_bytes(model, model, bits)


def _empty(config: PreTrainedConfig, dtype: torch.dtype, run: Run) -> PreTrainedModel:
    """A model of the config whose parameters have a shape and no values."""
    vision = hasattr(config, "vision_config")
    auto_class: Any = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    with init_empty_weights(include_buffers=False):
        model = auto_class.from_config(
            copy.deepcopy(config), dtype=dtype, trust_remote_code=run.training.trust_remote_code
        )
    # Making the parameters empty took the tied ones apart.
    model.tie_weights()
    return model


def bits_of(in_4bit: bool, in_8bit: bool) -> int | None:
    """Of a quantised weight; None without quantisation."""
    return 4 if in_4bit else 8 if in_8bit else None


def _dtype(name: str | None, saved: str | torch.dtype | None, device: str | torch.device) -> torch.dtype:
    """The type that a recipe names, that of the files for auto, as it is computed on a device."""
    dtype = saved if name == "auto" else name
    requested = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype or "float32")
    return product_dtype(requested, device)
