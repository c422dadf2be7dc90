"""Checks of `mmkd doctor` on what a run takes: memory of a device and room on a disk."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from mmkd.cache.hub import is_hub_id
from mmkd.cache.manifest import NAME
from mmkd.capture.captured_teacher import config_named
from mmkd.preparation.supervision import kept
from mmkd.recipe.recipe import Run
from mmkd.recipe.run_teacher import own_rows_of
from mmkd.units import readable_size

from .estimate import Loaded, memory_estimate, shape_of
from .facts import Finding, Rendered, Sample, Side

# Bytes per supervised token, measured on SmolLM2-135M-Instruct over text with 48 thousand and 152 thousand ids.
EXACT_BYTES, DRAW_BYTES, TOKEN_BYTES = 2.0, 1.4, 2.0
# Bytes per number of a hidden state, measured on SmolLM2-135M-Instruct.
STATE_BYTES = {"bfloat16": 1.4, "float16": 1.72, "float32": 3.4, "int8": 0.98}
# Bytes per row beside its scores: key, checksum, sizes of the compressed planes.
ROW_BYTES = 100
# Bytes per generated token of text.
TEXT_BYTES = 5


def memory(
    run: Run, student: Side, teachers: Loaded, sample: Sample, rendered: Rendered, sharded: bool
) -> list[Finding]:
    """What one device holds, against what it has."""
    shape = shape_of(run, sample, rendered)
    parts = memory_estimate(run, student, teachers, shape, run.training.device.type)
    device, room = device_memory()
    total = sum(parts.values())
    message = f"At least {readable_size(total)} of the {readable_size(room)} of {device}: " + ", ".join(
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
    return [Finding(severity, "memory", f"{message}.", advice)]


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
        row_bytes(run, int(sequence.supervised[kept(len(sequence.ids), run.training)].sum()))
        for sequence in rendered.usable
    )
    per_row *= own_share(run, sample) / len(rendered.usable)
    counts = [count for count in sample.totals.values() if count is not None]
    if len(counts) < len(sample.totals):
        each = f"about {readable_size(1e6 * per_row)} per million rows; how many rows there are is not documented"
        return [Finding("ok", "disk", f"The cache takes {each}. {readable_size(free)} are free at {parent}.")]
    once = head_bytes(run)
    total = sum(counts) * per_row + once
    severity = "problem" if total > free else "warning" if total > 0.5 * free else "ok"
    what = f"{token_bytes(run):,.0f} bytes per token" if run.cache.job == "score" else "answers as long as allowed"
    what += f", {readable_size(once)} for the head" if once else ""
    message = f"The cache takes about {readable_size(total)} ({sum(counts):,} rows, {what}); "
    message += f"{readable_size(free)} are free at {parent}."
    smaller = "Set cache_hidden_dtype: int8" if run.cache.cache_signal == "hidden" else "Lower teacher_top_k"
    advice = f"{smaller}, or name a folder with more room."
    return [Finding(severity, "disk", message, advice if severity != "ok" else "")]


def own_share(run: Run, sample: Sample) -> float:
    """The share of the training rows that concern a run of one of several teachers, in the sample."""
    return len(own_rows_of(run, sample.rows)["train"]) / len(sample.rows["train"])


def row_bytes(run: Run, supervised: int) -> float:
    """Bytes of a row with so many supervised tokens in the recipe's cache."""
    if run.cache.job == "generate":
        return ROW_BYTES + run.cache.cache_samples * run.cache.cache_max_new_tokens * TEXT_BYTES
    return ROW_BYTES + supervised * token_bytes(run)


def head_bytes(run: Run) -> float:
    """Bytes of the head in a cache of hidden states, which it keeps once."""
    if not _keeps_states(run):
        return 0
    config = _teacher_config(run)
    dtype = config.dtype or torch.float32
    return dtype.itemsize * config.hidden_size * config.vocab_size


def token_bytes(run: Run) -> float:
    """Bytes per supervised token in the recipe's cache of scores or states."""
    if _keeps_states(run):
        return STATE_BYTES[run.cache.cache_hidden_dtype] * _teacher_config(run).hidden_size
    if run.cache.cache_signal == "log_probs":
        return 4.0 if run.training.needs_boundaries else 2.0
    return EXACT_BYTES * run.arguments.teacher_top_k + DRAW_BYTES * run.cache.cache_tail_draws + TOKEN_BYTES


def _keeps_states(run: Run) -> bool:
    return run.cache.cache_signal == "hidden" and run.cache.job == "score" and run.arguments.teacher is not None


def _teacher_config(run: Run) -> Any:
    assert run.arguments.teacher is not None
    return config_named(run, run.arguments.teacher).get_text_config()


def is_to_be_built(cache: str) -> bool:
    """Whether there is neither a folder of this name nor, by its form, a cache on the Hub."""
    return not Path(cache).exists() and not is_hub_id(cache)


def takes_room(cache: str) -> bool:
    """Whether a build would write here: a folder that holds no cache, finished or not."""
    return not (Path(cache) / NAME).is_file() and (Path(cache).exists() or not is_hub_id(cache))
