"""How the benchmarks measure: CPU seconds of one thread or device events, and peak memory over the inputs."""

import argparse
import gc
import json
import math
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch

from mmkd.precision import native_dtype

MEGABYTE = 1 << 20
PACKAGES = ("torch", "transformers", "trl", "liger_kernel", "mmkd")

Step = Callable[[], float]
"""One run of what is measured; returns a value (a loss) that shows whether variants compute the same thing."""

Build = Callable[[Any], tuple[Step, Step]]
"""A case -> (a small run that loads whatever the libraries load once, the run to measure). Both share nothing else."""


@dataclass(frozen=True)
class Run:
    """The fastest of some runs, what the last of them returned, and the peak memory where that was measured."""

    seconds: float
    value: float
    megabytes: float | None = None


DTYPES = ("bfloat16", "float32")


def arguments(description: str | None, dtypes: Sequence[str] = DTYPES) -> argparse.ArgumentParser:
    """The flags that every benchmark has; `dtypes` are the types that it can measure."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--dtype",
        choices=dtypes,
        default=None if len(dtypes) > 1 else dtypes[0],
        help="of models and products (default: bfloat16 where the device has instructions for it)",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; ratios are steadiest with 1")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each variant, of which the fastest counts")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: everything runs, nothing is measured")
    parser.add_argument("--no_memory", dest="memory", action="store_false", help="times only")
    return parser


def dtype_of(args: argparse.Namespace) -> torch.dtype:
    """The type that is measured: the one asked for, else what the device multiplies natively."""
    return native_dtype(args.device) if args.dtype is None else getattr(torch, args.dtype)


def add_peer(parser: argparse.ArgumentParser, name: str, repository: str) -> None:
    """Adds the flag --name PATH of a peer that is measured from a checkout; the variable NAME gives its default."""
    text = f"a checkout of {repository}, to measure beside (default: the variable {name.upper()})"
    parser.add_argument(f"--{name}", metavar="PATH", default=os.environ.get(name.upper()), help=text)


def installed(package: str) -> bool:
    """Whether a peer can be imported, without importing it."""
    return util.find_spec(package) is not None


def machine(device: str) -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    versions = {name: metadata.version(name) if installed(name) else None for name in PACKAGES}
    facts = {
        "cpu": _cpu_model(),
        "bf16": _bf16_unit(),
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
    }
    if device == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return facts | {"device": device, **versions}


def _cpu_info(key: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def _cpu_model() -> str:
    return _cpu_info("model name") or platform.processor()


def _bf16_unit() -> str:
    """What multiplies bf16 matrices: with AMX they are about 2.5 times as fast, and everything else weighs more."""
    flags = _cpu_info("flags").split()
    return next((unit for unit in ("amx_bf16", "avx512_bf16") if unit in flags), "none")


def timed(step: Step, device: str) -> Run:
    """One run: seconds of the CPU, over all threads of the process, or of the device."""
    gc.collect()
    if device == "cpu":
        start = time.process_time()
        value = step()
        return Run(time.process_time() - start, value)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    value = step()
    end.record()
    torch.cuda.synchronize()
    return Run(begin.elapsed_time(end) / 1000, value)


def interleaved(steps: Mapping[str, Step], repeats: Mapping[str, int], device: str) -> dict[str, Run]:
    """The fastest run of each variant, in the order A B, B A, A B, so that all of them meet the machine's drift."""
    best: dict[str, Run] = {}
    if device == "cuda":
        for step in steps.values():
            step()
    for turn in range(max(repeats.values(), default=0)):
        for name in list(steps) if turn % 2 == 0 else reversed(list(steps)):
            if turn < repeats[name]:
                best[name] = faster(best.get(name), timed(steps[name], device))
    return best


def faster(one: Run | None, other: Run) -> Run:
    """The fastest time of two sets of runs, the value of the later and the memory of whichever has it."""
    if one is None:
        return other
    return Run(min(one.seconds, other.seconds), other.value, other.megabytes or one.megabytes)


def alone(build: Build, case: Any, device: str) -> Run:
    """One run and its peak memory over what exists before it: of the device, or resident in a new process."""
    if device == "cuda":
        warm_up, step = build(case)
        warm_up()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run = timed(step, device)
        return replace(run, megabytes=(torch.cuda.max_memory_allocated() - before) / MEGABYTE)
    # Forks of one server that has imported everything: importing torch and trl takes longer than many of the runs.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "mmkd.methods.kd", "trl.experimental.gkd"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_alone_in_this_process, build, case, torch.get_num_threads()).result()


def _alone_in_this_process(build: Build, case: Any, threads: int) -> Run:
    torch.set_num_threads(threads)
    warm_up, step = build(case)
    warm_up()
    gc.collect()
    # 5 resets the high-water mark of the resident set.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run = timed(step, "cpu")
    return replace(run, megabytes=(_status("VmHWM") - before) / MEGABYTE)


def _status(key: str) -> int:
    """A field of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The a of `value ~ size^a`, by least squares of the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def ratio(value: float | None, base: float | None) -> float | None:
    """`value / base`, or None where one of them was not measured."""
    return None if value is None or base is None else value / base


def verdict(name: str, value: float | None, limit: float) -> dict[str, Any]:
    """A target of PERFORMANCE.md next to what was measured."""
    return {"target": name, "measured": value, "limit": limit, "met": None if value is None else value <= limit}


def report(
    bench: str,
    device: str,
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    verdicts: Sequence[dict[str, Any]] = (),
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Prints the tables, the targets, and as the last line one JSON object with the machine and all numbers."""
    for title, rows in tables.items():
        _print_table(title, rows)
    for entry in verdicts:
        state = {None: "not measured", True: "met", False: "MISSED"}[entry["met"]]
        print(f"{state:>12}: {entry['target']}: {format_cell(entry['measured'])} (limit {entry['limit']:.3g})")
    facts = machine(device)
    settings = dict(settings or {})
    if "dtype" in settings:
        settings["dtype"] = settings["dtype"] or str(native_dtype(device)).removeprefix("torch.")
        print(f"in {settings['dtype']}")
    print("\n" + ", ".join(f"{name} {value}" for name, value in facts.items()))
    data = {"bench": bench, "machine": facts, "settings": settings, "tables": tables, "targets": verdicts}
    print(json.dumps(data, default=str), flush=True)


def _print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    print(f"\n{title}")
    if not rows:
        return
    lines = [list(rows[0]), *([format_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for first, *others in lines:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        print("  ".join([first.ljust(widths[0]), *cells]))
    print(flush=True)


def format_cell(value: Any) -> str:
    """A value as the tables show it."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"
