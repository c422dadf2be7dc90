"""Trains recipes that differ in method only, over several seeds, and prints how near each student came to its teacher.

    python scripts/compare.py sft/quickstart kd/quickstart taid/quickstart --seeds 0 1 2 --max_steps 100

The held-out text is that of the recipes' data. The first two rows are the teacher itself and the student before any
training. Every finished run is kept in OUTPUT/results.json, so that the command can be repeated after an interruption.
"""

import argparse
import hashlib
import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mmkd.dry_run import parameter_count
from mmkd.recipes import find_recipe
from mmkd.run import build_trainer, parse_run

COLUMNS = {"eval_perplexity": "perplexity", "eval_kl": "KL to teacher (nats)", "eval_top1_agreement": "top-1 agreement"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", help="recipes to compare, by name or path")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--output", type=Path, default=Path("runs/compare"))
    options, flags = parser.parse_known_args()
    results = Results(options.output / "results.json")
    first = options.recipes[0]
    # A student whose weights are the teacher's, and one that has not been trained.
    teacher = parse_run(first, flags).arguments.teacher
    assert teacher is not None
    as_teacher = ["--method", "sft", "--student", teacher, "--student_init", "pretrained"]
    rows: list[tuple[str, list[dict[str, float]]]] = [
        ("teacher", [results.get(first, _without_pruning(first, options.output, [*flags, *as_teacher]), train=False)]),
        ("student, untrained", [results.get(first, flags, train=False)]),
    ]
    for recipe in options.recipes:
        runs = [results.get(recipe, [*flags, "--seed", str(seed)]) for seed in options.seeds]
        rows.append((parse_run(recipe, flags).arguments.method, runs))
    show(rows, options.seeds)


class Results:
    """Finished runs by what they ran; written after each one."""

    def __init__(self, path: Path):
        self.path = path
        self.known: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.is_file() else {}

    def get(self, recipe: str | Path, flags: list[str], train: bool = True) -> dict[str, float]:
        """The measurements of one run, from the file or by running it."""
        text = find_recipe(recipe).read_text(encoding="utf-8")
        key = hashlib.sha256(json.dumps([text, flags, train]).encode()).hexdigest()[:16]
        if key not in self.known:
            self.known[key] = measure(str(recipe), flags, train, self.path.parent / key)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".tmp")
            partial.write_text(json.dumps(self.known, indent=1))
            os.replace(partial, self.path)
        return self.known[key]


def measure(recipe: str, flags: list[str], train: bool, output: Path) -> dict[str, float]:
    """Trains if asked to, evaluates, and says how long it took."""
    trainer = build_trainer(parse_run(recipe, [*flags, "--output_dir", str(output), "--save_strategy", "no"]))
    seconds = 0.0
    if train:
        seconds = trainer.train().metrics["train_runtime"]
        trainer.save_model()
    result: dict[str, Any] = trainer.evaluate()
    tokens = trainer.tokens_seen
    speed = tokens / seconds if train else float("nan")
    return {**result, "parameters": parameter_count(trainer.model), "tokens": tokens, "tokens_per_second": speed}


def _without_pruning(recipe: str, folder: Path, flags: list[str]) -> list[str]:
    return flags


def show(rows: list[tuple[str, list[dict[str, float]]]], seeds: list[int]) -> None:
    """One line per method: mean over seeds, with the standard deviation where there are several."""
    table = Table(*["", "parameters", "tokens seen", *COLUMNS.values(), "tokens/s"])
    for name, runs in rows:
        cells = [_spread([run[column] for run in runs]) for column in COLUMNS]
        tokens, speed = runs[0]["tokens"], statistics.fmean(run["tokens_per_second"] for run in runs)
        parameters = f"{runs[0]['parameters'] / 1e6:.1f} M"
        table.add_row(name, parameters, f"{tokens:,.0f}" if tokens else "", *cells, f"{speed:.0f}" if tokens else "")
    console = Console(width=120)
    console.print(table)
    console.print(f"seeds {seeds}; mean ± standard deviation; torch {torch.__version__}, {torch.get_num_threads()} threads,")
    console.print(f"{platform.machine()}, {os.cpu_count()} cores")


def _spread(values: list[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} ± {statistics.stdev(values):.3f}"


if __name__ == "__main__":
    main()
