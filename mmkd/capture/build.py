"""`mmkd cache build`: the teacher's pass over the data, shard by shard, stopped and resumed at any moment."""

import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmkd.cache.manifest import Manifest
from mmkd.cache.store import CacheWriter
from mmkd.errors import UserError
from mmkd.files import write_file
from mmkd.generation.generator import Advance

from .build_plan import Plan, ShardResult


def build(plan: Plan, console: Console) -> Path:
    """Writes what is missing of a cache; returns its folder.

    Raises UserError as `CacheWriter` and the teacher do, and when more rows than `max_skipped` had to be left out;
    what was written stays.
    """
    with CacheWriter(plan.folder, plan.manifest, plan.features) as writer:
        for name, content in plan.files().items():
            write_file(plan.folder / name, content)
        missing = writer.manifest.missing()
        with Report(console, writer.manifest, missing, plan.counted) as report:
            for result in _results(plan, missing, report.advance):
                writer.write(result.split, result.number, result.rows, result.skipped, result.cost)
                report.shard_done(result)
                if _too_many_skipped(plan, writer.manifest):
                    break
        if writer.manifest.skipped_rows():
            console.print(f"Skipped: {writer.manifest.skipped_summary()}", highlight=False, markup=False)
        for line in plan.summary(writer.manifest):
            console.print(line, highlight=False, markup=False)
        if not writer.manifest.missing():
            plan.complete(writer.manifest, console)
            writer.finish()
    if _too_many_skipped(plan, writer.manifest):
        raise UserError(
            f"{writer.manifest.skipped_rows():,} of {writer.manifest.rows():,} rows had to be skipped, more than the "
            f"share of max_skipped: {plan.arguments.max_skipped:g}. Correct the data or the teacher, or raise "
            f"max_skipped; {plan.folder} keeps what was done, and the same command goes on from there."
        )
    return plan.folder


def _too_many_skipped(plan: Plan, manifest: Manifest) -> bool:
    return manifest.skipped_rows() > plan.arguments.max_skipped * manifest.rows()


def _results(plan: Plan, missing: list[tuple[str, int]], advance: Advance) -> Iterator[ShardResult]:
    if not missing:
        return iter(())
    if plan.arguments.engine == "ray":
        from .distributed import shards_on_ray

        return shards_on_ray(plan, missing)
    return (plan.shard(split, number, advance) for split, number in missing)


class Report:
    """Progress with time left: a bar on a terminal, a line per shard elsewhere."""

    def __init__(self, console: Console, manifest: Manifest, missing: list[tuple[str, int]], counted: str):
        self._console, self._missing, self._counted = console, len(missing), counted
        self._total = len(manifest.planned())
        self._done, self._tokens, self._start = 0, 0, time.monotonic()
        columns = [TextColumn("shards"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
        self._progress = Progress(*columns, TextColumn("{task.fields[speed]}"), console=console)
        self._task = self._progress.add_task(
            "shards", total=self._total, completed=self._total - self._missing, speed=""
        )

    def __enter__(self) -> "Report":
        if self._missing < self._total:
            self._console.print(f"{self._total - self._missing} of {self._total} shards are there and intact.")
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, tokens: int) -> None:
        """Counts tokens that were read."""
        self._tokens += tokens
        self._progress.update(self._task, speed=f"{self._speed():,.0f} {self._counted.split()[-1]}/s")

    def shard_done(self, result: ShardResult) -> None:
        """Counts a shard that was written."""
        self._done += 1
        self._progress.advance(self._task)
        for row, entry in result.skipped.items():
            self._console.print(f"Skipped row {row} of {result.split}: {entry.reason}", markup=False)
        if not self._console.is_terminal:
            left = (time.monotonic() - self._start) / self._done * (self._missing - self._done)
            supervised = sum(row["tokens"] for row in result.rows)
            self._console.print(
                f"{result.split} shard {result.number}: {len(result.rows)} rows, {supervised:,} {self._counted}; "
                f"{self._total - self._missing + self._done} of {self._total} done, {left / 60:.1f} minutes left",
                highlight=False,
            )

    def _speed(self) -> float:
        return self._tokens / max(1e-9, time.monotonic() - self._start)
