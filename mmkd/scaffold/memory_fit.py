"""What makes a recipe fit a device: batch, checkpointing, quantisation, LoRA or a cache, by `mmkd plan`'s estimate."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from mmkd.preflight.estimate import count_teacher, count_work, memory_of, shape_of, together
from mmkd.preflight.facts import Rendered, Sample, Side
from mmkd.preflight.hardware import Device
from mmkd.preflight.plan import plan
from mmkd.recipe.recipe import Recipe, Run
from mmkd.recipe.run_teacher import reads_teacher

ROOM = 0.8
"""The share of a device's memory that is planned with; doctor warns above it."""

_BATCHES = (1, 2, 4, 8, 16, 32)
_ENOUGH = 2
"""Rows of a micro-batch below which the next saving is tried: with one alone the device mostly waits."""

CHECKPOINTING = {"activation_checkpointing": True}
QUANTISED_TEACHER = {"teacher_load_in_4bit": True}
LORA = {"use_peft": True, "lora_target_modules": "all-linear", "dtype": "bfloat16"}
QLORA = {**LORA, "load_in_4bit": True}


@dataclass(frozen=True)
class Looked:
    """What the estimate reads: the models without weights, and a sample of rows."""

    student: Side
    teacher: Side | None
    sample: Sample
    rendered: Rendered


@dataclass(frozen=True)
class Fit:
    """A way to train on a device."""

    keys: Mapping[str, Any]
    """Of the recipe, besides the batch."""
    batch: int
    memory: float
    """Bytes that the estimate counts."""
    fits: bool


def savings(device: Device, cache: Mapping[str, Any] | None, prunes: str | None) -> list[dict[str, Any]]:
    """What is tried, from what costs nothing to what costs most.

    `cache` has the keys of a cache where the method reads one; `prunes` is the teacher where the student is made of
    it, which has no weights that could be quantised or adapted, and cannot be made of quantised ones.
    """
    tries: list[dict[str, Any]] = [{"activation_checkpointing": False}, CHECKPOINTING]
    if device.kind == "cpu":
        # bitsandbytes is slow there, and memory is rarely what is short.
        return tries
    whole = {} if prunes is None else {"student": prunes}
    tries.append({**CHECKPOINTING, **QUANTISED_TEACHER, **whole})
    if cache is not None:
        tries.append({**CHECKPOINTING, **QUANTISED_TEACHER, **whole, **cache})
    if prunes is None:
        tries += [{**CHECKPOINTING, **QUANTISED_TEACHER, **LORA}, {**CHECKPOINTING, **QUANTISED_TEACHER, **QLORA}]
        if cache is not None:
            tries.append({**CHECKPOINTING, **QUANTISED_TEACHER, **QLORA, **cache})
    return tries


def fit_tokens(recipe: Recipe, looked: Looked, device: Device, tries: Sequence[Mapping[str, Any]], most: int) -> Fit:
    """The first saving with which a few rows fit, with as many rows as fit, at most `most`.

    Where only one row fits at best, the first saving with which it does; where nothing fits, the last one, and the
    answer says so.
    """
    tight: Fit | None = None
    for keys in tries:
        run = recipe.with_(**keys).parse()
        fit = _largest(run, keys, looked, device, most) if _can_be_built(run, looked, device) else None
        if fit is not None and fit.batch >= min(_ENOUGH, most):
            return fit
        tight = tight or fit
    if tight is not None:
        return tight
    _, memory = next(_memories(recipe.with_(**tries[-1]).parse(), looked, device))
    return Fit(tries[-1], 1, memory, False)


def _largest(run: Run, keys: Mapping[str, Any], looked: Looked, device: Device, most: int) -> Fit | None:
    """The largest batch that fits, at most `most`; None where not even one row does."""
    fit: Fit | None = None
    for batch, memory in _memories(run, looked, device):
        if memory > ROOM * device.memory or batch > most:
            break
        fit = Fit(keys, batch, memory, True)
    return fit


def _memories(run: Run, looked: Looked, device: Device) -> Iterator[tuple[int, float]]:
    """Rows of a micro-batch, and the bytes that they take on the device."""
    shape = replace(shape_of(run, looked.sample, looked.rendered), rows=1)
    teacher = None
    if looked.teacher is not None and reads_teacher(run.arguments):
        teacher = together([count_teacher(run, looked.teacher, shape, device.kind, flops=False)], None)
    parts = memory_of(count_work(run, looked.student, teacher, shape, device.kind, flops=False), "ddp", 1)
    # Counting models of billions takes seconds, and of all parts only this one grows with the rows.
    activations = parts.pop("activations")
    for batch in _BATCHES:
        yield batch, sum(parts.values()) + batch * activations


def _can_be_built(run: Run, looked: Looked, device: Device) -> bool:
    """Whether the teacher fits by itself, where it is to be asked once and written to disk."""
    if run.arguments.teacher_cache is None or looked.teacher is None:
        return True
    shape = replace(shape_of(run, looked.sample, looked.rendered), rows=1)
    return count_teacher(run, looked.teacher, shape, device.kind, flops=False).weights <= ROOM * device.memory


def fit_by_plan(recipe: Recipe, device: Device, batches: Sequence[Mapping[str, Any]]) -> Fit:
    """The first of these batches that fits by `mmkd plan`, else the last: for methods with a plan of their own."""
    # Planned with the same room as others.
    tight = replace(device, memory=device.memory * ROOM)
    for keys in batches:
        if plan(recipe.with_(**keys), tight, 1, None, Console(file=io.StringIO())) == 0:
            return Fit(keys, keys["per_device_train_batch_size"], 0.0, True)
    return Fit(batches[-1], batches[-1]["per_device_train_batch_size"], 0.0, False)
