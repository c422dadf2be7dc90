"""Trains recipes that differ in method only, over several seeds, and prints how near each student came to its teacher.

    python scripts/compare.py sft/quickstart kd/quickstart taid/quickstart --seeds 0 1 2 --max_steps 100

The held-out text is that of the recipes' data. The first two rows are the teacher itself and the student before any
training. Every finished run is kept in OUTPUT/results.json, so that the command can be repeated after an interruption.

Where a method's own evaluation does not say what others' do, name the recipe that judges all students:

    python scripts/compare.py sft/smollm2 alm/gemma3_to_smollm2 --judge alm/gemma3_to_smollm2 --seeds 0 1 2
"""

import argparse
import hashlib
import json
import os
import platform
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mmkd.recipes import find_recipe
from mmkd.run import build_trainer, parse_run

COLUMNS = {
    "eval_perplexity": "perplexity",
    "eval_kl": "KL to teacher (nats)",
    "eval_top1_agreement": "top-1 agreement",
    "eval_bits_per_byte": "bits per byte",
    "eval_chunk_gap": "gap per chunk (nats)",
    "eval_chunk_kl": "KL per chunk (nats)",
}
"""What is shown of an evaluation that says it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", help="recipes to compare, by name or path")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--output", type=Path, default=Path("runs/compare"))
    parser.add_argument("--judge", help="recipe whose trainer evaluates all students; default: each one's own")
    options, flags = parser.parse_known_args()
    results = Results(options.output / "results.json", options.judge)
    first = options.judge or options.recipes[0]
    rows: list[tuple[str, list[dict[str, float]]]] = [
        ("teacher", [results.get(first, flags, stage="teacher")]),
        ("student, untrained", [results.get(first, flags, stage="untrained")]),
    ]
    for recipe in options.recipes:
        runs = [results.get(recipe, [*flags, "--seed", str(seed)]) for seed in options.seeds]
        rows.append((_label(recipe, flags), runs))
    show(rows, options.seeds)


class Results:
    """Finished runs by what they ran; written after each one."""

    def __init__(self, path: Path, judge: str | None):
        self.path, self.judge = path, judge
        self.known: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.is_file() else {}

    def get(self, recipe: str, flags: list[str], stage: str = "trained") -> dict[str, float]:
        """The measurements of one run, from the file or by running it."""
        text = find_recipe(recipe).read_text(encoding="utf-8")
        judge = [find_recipe(self.judge).read_text(encoding="utf-8")] if self.judge else []
        key = hashlib.sha256(json.dumps([text, flags, stage, *judge]).encode()).hexdigest()[:16]
        if key not in self.known:
            self.known[key] = measure(recipe, flags, stage, self.path.parent, self.judge)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".tmp")
            partial.write_text(json.dumps(self.known, indent=1))
            os.replace(partial, self.path)
        return self.known[key]


def measure(recipe: str, flags: list[str], stage: str, folder: Path, judge: str | None) -> dict[str, float]:
    """Evaluates the recipe's teacher ("teacher") or its student, "untrained" or "trained"."""
    run = parse_run(recipe, [*flags, "--save_strategy", "no"])
    run.training.output_dir = str(folder / f"{Path(recipe).parent.name}-{Path(recipe).stem}-{run.training.seed}")
    if stage == "teacher":
        whole = {"student": run.arguments.teacher, "student_init": "pretrained", "student_layers": None}
        narrow = {"student_intermediate_size": None, "student_num_attention_heads": None}
        run = replace(run, arguments=replace(run.arguments, **whole, **narrow))
    trainer = build_trainer(run)
    result: dict[str, float] = {"parameters": trainer.model.num_parameters()}
    if stage == "trained":
        seconds = trainer.train().metrics["train_runtime"]
        tokens = next(entry for entry in reversed(trainer.state.log_history) if "supervised_tokens" in entry)
        result["tokens"] = tokens["supervised_tokens"]
        result["tokens_per_second"] = result["tokens"] / seconds
        trainer.save_model()
    if stage == "trained" and (judge is not None or run.arguments.teacher_cache is not None):
        # Judged by the teacher itself, like all others.
        saved = {"student": run.training.output_dir, "student_init": "pretrained", "student_layers": None}
        judging = run if judge is None else parse_run(judge, ["--save_strategy", "no"])
        judging.training.output_dir = f"{run.training.output_dir}-judged"
        trainer = build_trainer(replace(judging, arguments=replace(judging.arguments, **saved, teacher_cache=None)))
    return {**result, **trainer.evaluate()}


def show(rows: list[tuple[str, list[dict[str, float]]]], seeds: list[int]) -> None:
    """One line per method: mean over seeds, with the standard deviation where there are several."""
    columns = [column for column in COLUMNS if all(column in run for _, runs in rows for run in runs)]
    table = Table(*["", "parameters", "tokens seen", *(COLUMNS[column] for column in columns), "tokens/s"])
    for name, runs in rows:
        cells = [_spread([run[column] for run in runs]) for column in columns]
        trained = "tokens" in runs[0]
        tokens = f"{runs[0]['tokens']:,.0f}" if trained else ""
        speed = f"{statistics.fmean(run['tokens_per_second'] for run in runs):.0f}" if trained else ""
        table.add_row(name, f"{runs[0]['parameters'] / 1e6:.1f} M", tokens, *cells, speed)
    console = Console(width=120)
    console.print(table)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    console.print(f"seeds {seeds}{', mean ± standard deviation' if len(seeds) > 1 else ''}; {machine}")


def _label(recipe: str, flags: list[str]) -> str:
    method, name = parse_run(recipe, flags).arguments.method, Path(recipe).stem
    return method if name == "quickstart" else f"{method}, {name}"


def _spread(values: list[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} ± {statistics.stdev(values):.3f}"


if __name__ == "__main__":
    main()
