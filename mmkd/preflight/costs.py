"""Checks of `mmkd doctor` on what a run takes: memory of a device and room on a disk."""

import copy
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from trl.trainer.utils import get_peft_config

from mmkd.cache.hub import is_hub_id
from mmkd.cache.manifest import NAME
from mmkd.models.assemble import prune
from mmkd.precision import product_dtype
from mmkd.preparation.supervision import kept
from mmkd.recipe.run import Run, own_rows_of
from mmkd.recipe.run_models import pruning_of
from mmkd.units import readable_size

from .dry_run import at_a_time, estimate_memory, logits_of
from .facts import Finding, Rendered, Sample, Side

# Bytes per supervised token, measured on SmolLM2-135M-Instruct over text with 48 thousand and 152 thousand ids.
EXACT_BYTES, DRAW_BYTES, TOKEN_BYTES = 2.0, 1.4, 2.0
# Bytes per row beside its scores: key, checksum, sizes of the compressed planes.
ROW_BYTES = 100
# Besides the value itself a group of 64 shares a scale of 32 bits.
SCALE_BITS = 0.5
# Bytes per generated token of text.
TEXT_BYTES = 5


Loaded = Sequence[tuple[Run, Side]]
"""The teachers that are loaded to train, each with the run of it alone."""


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
    return prune(model, **pruning_of(run))


def memory(run: Run, student: PreTrainedModel, teachers: Loaded, rendered: Rendered, sharded: bool) -> list[Finding]:
    """What one device holds at least, against what it has."""
    parts = memory_parts(run, student, teachers, max(len(one.ids) for one in rendered.usable))
    device, room = device_memory()
    total = sum(parts.values())
    found = f"At least {readable_size(total)} of the {readable_size(room)} of {device}: " + ", ".join(
        f"{name} {readable_size(part)}" for name, part in parts.items()
    )
    severity, advice = "ok", ""
    if total > 0.8 * room:
        severity, advice = (
            "warning",
            "Little is left for fragments and longer rows: lower per_device_train_batch_size.",
        )
    if total > room and sharded:
        advice = "accelerate_config shards weights and optimizer: divide by the number of devices."
    elif total > room and not torch.cuda.is_available():
        advice = "Run it on a machine with an accelerator that has the memory."
    elif total > room:
        severity = "problem"
        advice = (
            "Lower per_device_train_batch_size or max_length, load the teacher in 4 bits, build a teacher_cache, use "
            "LoRA, or shard with accelerate_config: zero3."
        )
    return [Finding(severity, "memory", f"{found}.", advice)]


def memory_parts(run: Run, student: PreTrainedModel, teachers: Loaded, longest: int) -> dict[str, float]:
    """Bytes of everything that `mmkd train --dry_run` counts, where the longest row has so many tokens."""
    args, peft = copy.copy(run.training), get_peft_config(run.student)
    # The estimate is to be a lower one, and rows may all be shorter than max_length.
    if not args.packing:
        args.max_length = min(longest, args.max_length or longest)
    model: Any = student
    if peft is not None:
        with torch.device("meta"):
            model = get_peft_model(student, peft, low_cpu_mem_usage=True)
    tokens = student.config.get_text_config().vocab_size
    trainer: Any = SimpleNamespace(args=args, model=model, vocab_size=tokens, teacher=None)
    parts = estimate_memory(trainer).parts
    parts["student weights"] = weight_bytes(
        model, student, bits_of(run.student.load_in_4bit, run.student.load_in_8bit)
    )
    if teachers:
        chunks = at_a_time(len(teachers), run.arguments.teacher_column)
        parts["logits of one chunk"] = logits_of(args, tokens, chunks, args.device.type)
        parts["teacher weights"] = sum(empty_teacher(one, side)[1] for one, side in teachers)
    return parts


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


def device_memory() -> tuple[str, int]:
    """The name and bytes of the smallest device that would train: an accelerator, or else this machine's memory."""
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        smallest = min(devices, key=lambda device: device.total_memory)
        return smallest.name, smallest.total_memory
    return "this machine (it has no accelerator)", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cache_room(run: Run, sample: Sample, rendered: Rendered) -> list[Finding]:
    """What building the recipe's cache will write, against the room there is."""
    assert run.arguments.teacher_cache is not None
    parent = Path(run.arguments.teacher_cache).absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    per_row = sum(
        row_bytes(run, int(one.supervised[kept(len(one.ids), run.training)].sum())) for one in rendered.usable
    )
    per_row *= own_share(run, sample) / len(rendered.usable)
    counts = [count for count in sample.totals.values() if count is not None]
    if len(counts) < len(sample.totals):
        each = f"about {readable_size(1e6 * per_row)} per million rows; how many rows there are is not documented"
        return [Finding("ok", "disk", f"The cache takes {each}. {readable_size(free)} are free at {parent}.")]
    total = sum(counts) * per_row
    severity = "problem" if total > free else "warning" if total > 0.5 * free else "ok"
    what = f"{_token_bytes(run):.0f} bytes per token" if run.cache.job == "score" else "answers as long as allowed"
    found = f"The cache takes about {readable_size(total)} ({sum(counts):,} rows, {what}); "
    found += f"{readable_size(free)} are free at {parent}."
    advice = "Lower teacher_top_k, or name a folder with more room."
    return [Finding(severity, "disk", found, advice if severity != "ok" else "")]


def own_share(run: Run, sample: Sample) -> float:
    """The share of the training rows that concern a run of one of several teachers, in the sample."""
    return len(own_rows_of(run, sample.rows)["train"]) / len(sample.rows["train"])


def row_bytes(run: Run, supervised: int) -> float:
    """Bytes of a row with so many supervised tokens in the recipe's cache."""
    if run.cache.job == "generate":
        return ROW_BYTES + run.cache.cache_samples * run.cache.cache_max_new_tokens * TEXT_BYTES
    return ROW_BYTES + supervised * _token_bytes(run)


def _token_bytes(run: Run) -> float:
    if run.cache.cache_signal == "log_probs":
        return 2.0
    return EXACT_BYTES * run.arguments.teacher_top_k + DRAW_BYTES * run.cache.cache_tail_draws + TOKEN_BYTES


def is_to_be_built(cache: str) -> bool:
    """Whether there is neither a folder of this name nor, by its form, a cache on the Hub."""
    return not Path(cache).exists() and not is_hub_id(cache)


def takes_room(cache: str) -> bool:
    """Whether a build would write here: a folder that holds no cache, finished or not."""
    return not (Path(cache) / NAME).is_file() and (Path(cache).exists() or not is_hub_id(cache))


def bits_of(in_4bit: bool, in_8bit: bool) -> int | None:
    """Of a quantised weight; None without quantisation."""
    return 4 if in_4bit else 8 if in_8bit else None


def _dtype(name: str | None, saved: str | torch.dtype | None, device: str | torch.device) -> torch.dtype:
    """The type that a recipe names, that of the files for auto, as it is computed on a device."""
    dtype = saved if name == "auto" else name
    wanted = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype or "float32")
    return product_dtype(wanted, device)
