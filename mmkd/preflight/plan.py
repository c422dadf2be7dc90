"""`mmkd plan`: whether a run fits devices that are not here, and what it would take, as a table."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from mmkd.errors import UserError
from mmkd.precision import name_of_dtype
from mmkd.recipe.recipe import Recipe, Run
from mmkd.recipe.run_teacher import reads_teacher
from mmkd.training.method import METHODS
from mmkd.units import readable_size

from . import costs
from .estimate import ModelCosts, Shape, Work, count_teacher, count_work, logits_of, memory_of, shape_of, together
from .facts import Sample, Side, render, student_side, take_sample, teacher_side
from .hardware import GIB, USABLE, Device
from .stage_checks import StageRun, each_run

STRATEGIES = ("ddp", "zero2", "zero3", "fsdp2")
# Of vLLM's JSON, with rank and text: 4.9 KB per token for the top 64.
TOP_K_BYTES = 76


def plan(recipe: Recipe, device: Device, devices: int, price: float | None, console: Console) -> int:
    """Prints the plan of a recipe on so many devices; returns 0 when some way of training fits, 1 when none does.

    Loads configs, tokenizers and a sample of rows, and no weights. Raises UserError for a recipe that cannot be read
    and for fewer than one device.
    """
    if devices < 1:
        raise UserError(f"--gpus is {devices}; a run needs at least one.")
    # Any stage that fits nowhere ends the run there.
    return max(_plan_one(stage, device, devices, price, console) for stage in each_run(recipe))


def _plan_one(stage: StageRun, device: Device, devices: int, price: float | None, console: Console) -> int:
    plan_run = METHODS[stage.run.arguments.method].plan or plan_tokens
    return plan_run(stage, device, devices, price, console)


def plan_tokens(stage: StageRun, device: Device, devices: int, price: float | None, console: Console) -> int:
    """Prints the plan of a training over tokens; returns 0 when some way of training fits, 1 when none does."""
    recipe, run, chosen = stage.title, stage.run, stage.config
    student, sample = student_side(run), take_sample(run)
    shape = shape_of(run, sample, render(run, student, sample))
    alone = run.by_teacher()
    teachers = {
        name: count_teacher(teacher_run, teacher_side(teacher_run), shape, device.kind)
        for name, teacher_run in alone.items()
        if teacher_run.arguments.teacher
    }
    loaded = [counted for name, counted in teachers.items() if reads_teacher(alone[name].arguments)]
    work = count_work(run, student, together(loaded, run.arguments.teacher_column), shape, device.kind)
    strategies = [chosen] if chosen in STRATEGIES else list(STRATEGIES[:1] if devices == 1 else STRATEGIES)
    console.print(
        f"mmkd plan {recipe}: {devices} x {device.name} ({device.memory / GIB:.0f} GiB), {shape.rows} x "
        f"{shape.tokens:,} tokens on each, {shape.supervised:,.0f} of a row compared.",
        highlight=False,
    )
    console.print(_memory_table(work, strategies, devices, device))
    console.print(
        f"At {device.utilisation:.0%} of {device.flops / 1e12:,.3g} {device.dtype} TFLOPS on each:",
        highlight=False,
    )
    console.print(_time_table(run, sample, work, strategies, devices, device, price))
    for name, teacher in teachers.items():
        title = f"{name}: " if name else ""
        console.print(title + _cache(alone[name], sample, shape, teacher, device), highlight=False)
        if alone[name].arguments.teacher_server is not None and alone[name].arguments.teacher_cache is None:
            seconds = max(seconds_of(work, strategies[0], devices, run.training.gradient_accumulation_steps, device))
            console.print(title + _traffic(alone[name], work, teacher, devices, seconds), highlight=False)
    fits = any(_fits(work, name, devices, device) for name in strategies)
    if not fits:
        console.print("It does not fit. What would change that, each by itself:", highlight=False)
        for line in _ways(run, student, work, strategies, devices, device):
            console.print(line, highlight=False)
    return 0 if fits else 1


def _fits(work: Work, strategy: str, devices: int, device: Device) -> bool:
    return sum(memory_of(work, strategy, devices).values()) <= USABLE * device.memory


def _memory_table(work: Work, strategies: Sequence[str], devices: int, device: Device) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("GiB on one device")
    parts = {name: memory_of(work, name, devices) for name in strategies}
    for name in strategies:
        table.add_column(name if devices > 1 else "", justify="right")
    for kind in dict.fromkeys(kind for kinds in parts.values() for kind in kinds):
        table.add_row(kind, *(_gib(parts[name].get(kind, 0.0)) for name in strategies))
    table.add_row("in all", *(_gib(sum(parts[name].values())) for name in strategies), style="bold")
    table.add_row("fits", *("yes" if _fits(work, name, devices, device) else "no" for name in strategies))
    return table


def _time_table(
    run: Run,
    sample: Sample,
    work: Work,
    strategies: Sequence[str],
    devices: int,
    device: Device,
    price: float | None,
) -> Table:
    args = run.training
    table = Table(box=box.SIMPLE)
    table.add_column("per optimizer step")
    for name in strategies:
        table.add_column(name if devices > 1 else "", justify="right")
    flops = args.gradient_accumulation_steps * devices * work.flops
    table.add_row("TFLOPs", *(f"{flops / 1e12:,.2f}" for _ in strategies))
    times = {name: seconds_of(work, name, devices, args.gradient_accumulation_steps, device) for name in strategies}
    table.add_row("seconds computing", *(f"{times[name][0]:,.3g}" for name in strategies))
    if devices > 1:
        table.add_row("seconds sending, hidden at best", *(f"{times[name][1]:,.3g}" for name in strategies))
    tokens = args.gradient_accumulation_steps * devices * work.shape.rows * work.shape.tokens
    table.add_row("tokens per second", *(f"{tokens / max(times[name]):,.0f}" for name in strategies))
    steps = _steps(run, sample, work.shape.data_rows, devices)
    if steps is None:
        table.add_row("steps", *("how many rows there are is not documented" for _ in strategies))
        return table
    hours = {name: steps * max(times[name]) * devices / 3600 for name in strategies}
    table.add_row("steps of the run", *(f"{steps:,}" for _ in strategies))
    table.add_row("device-hours of the run", *(f"{hours[name]:,.3g}" for name in strategies))
    if price is not None:
        table.add_row("cost of the run", *(f"{price * hours[name]:,.2f}" for name in strategies))
    return table


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


def _steps(run: Run, sample: Sample, data_rows: float, devices: int) -> int | None:
    """Optimizer steps of the run; None where neither the recipe nor the data say how many."""
    args = run.training
    if args.max_steps > 0:
        return args.max_steps
    rows = sample.totals["train"]
    if rows is None:
        return None
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * devices * data_rows
    return math.ceil(math.ceil(rows / batch) * args.num_train_epochs)


def _cache(run: Run, sample: Sample, shape: Shape, teacher: ModelCosts, device: Device) -> str:
    """What the teacher's answers on disk would take, and asking for them once."""
    per_row = costs.row_bytes(run, round(shape.supervised))
    flops = teacher.passes.forward / shape.rows + 2 * shape.supervised * teacher.width * teacher.vocabulary
    seconds = flops / (device.flops * device.utilisation)
    rows = sample.totals["train"]
    if rows is None:
        many, scope = 1e6, "per million rows of training"
    else:
        many, scope = rows * costs.own_share(run, sample) / shape.data_rows, f"for {rows:,} rows"
    size = readable_size(many * per_row + costs.head_bytes(run))
    if run.cache.job == "score":
        size += f" ({costs.token_bytes(run):,.0f} bytes per token)"
    return (
        f"A teacher_cache takes {size} {scope}, and {many * seconds / 3600:,.3g} device-hours of the teacher to build."
    )


def _traffic(run: Run, work: Work, teacher: ModelCosts, devices: int, seconds: float) -> str:
    """What servers would send for each optimizer step, and the link that keeps up with the training."""
    arguments, shape = run.arguments, work.shape
    tokens = run.training.gradient_accumulation_steps * devices * shape.rows
    named = arguments.teacher_server_dtype
    if named == "auto":
        saved = arguments.teacher_dtype if arguments.teacher_dtype != "auto" else teacher_side(run).config.dtype
        named = name_of_dtype(saved or "float32")
    size = getattr(torch, named).itemsize
    # A teacher with tokens of its own is asked for those alone.
    k = arguments.teacher_top_k if METHODS[arguments.method].one_vocabulary else 1
    # States come of every token that is read, log-probs of the prompt too.
    step = {
        "hidden": tokens * shape.tokens * teacher.width * size,
        "top_k": tokens * shape.tokens * k * TOP_K_BYTES,
    }
    wanted = [arguments.teacher_server_signal] if arguments.teacher_server_signal in step else list(step)
    return (
        "The servers send "
        + " or ".join(
            f"{readable_size(step[signal])} per optimizer step as {signal}, for which a link of "
            f"{8 * step[signal] / seconds / 1e9:,.3g} Gbit/s keeps up with the computing here"
            for signal in wanted
        )
        + "."
    )


def _ways(
    run: Run,
    student: Side,
    work: Work,
    strategies: Sequence[str],
    devices: int,
    device: Device,
) -> Iterator[str]:
    """Settings that need less, with the least memory that any strategy then takes."""
    smaller = replace(work.shape, rows=1)
    ways = {}
    if work.teacher is not None:
        alone = logits_of(run.training, work.student.vocabulary, 0, device.kind)
        ways["a teacher_cache"] = replace(work, teacher=None, logits=alone)
    if not work.checkpointing:
        ways["activation_checkpointing: true"] = replace(work, checkpointing=True)
    if work.shape.rows > 1:
        ways["per_device_train_batch_size: 1"] = count_work(run, student, work.teacher, smaller, device.kind)
    if not run.student.use_peft and run.arguments.student_init == "pretrained":
        lora = replace(run, student=replace(run.student, use_peft=True))
        ways["use_peft: true (LoRA)"] = count_work(lora, student, work.teacher, work.shape, device.kind)
    for name, way in ways.items():
        least = min(sum(memory_of(way, strategy, devices).values()) for strategy in strategies)
        verdict = "fits" if least <= USABLE * device.memory else "does not fit either"
        yield f"  {name}: {_gib(least)} GiB, {verdict}"
    yield "  more devices: --gpus, with zero3 or fsdp2"


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"
