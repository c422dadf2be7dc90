"""Trains a staged recipe under several schedules and settings over several seeds, and prints their accuracy.

    python scripts/compare_stages.py llava_kd/easy_vqa --seeds 0 1 2 \\
        --schedules PT-SFT-SFT DPT-SFT-DFT "DPT-SFT-DFT:beta=0,gamma=0"

A schedule is stages joined by "-", with optional settings after ":", of every distilled stage or of one of them
(DFT.beta=0). The answer is what the student writes greedily, right if it is the data's answer word for word. `--test`
is JSONL of conversations with images; without it the recipe's eval rows are asked, which is what choices are made by.
Stages that schedules share are trained once. Every finished measurement is kept in OUTPUT/results.json.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from mmkd.commands.train import train
from mmkd.data.images import read_image
from mmkd.files import write_file
from mmkd.models.load import load_model, load_processing_class
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.recipe import Recipe
from mmkd.recipe.run import load_rows_of
from mmkd.recipe.stages import plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a recipe in stages, by name or path")
    parser.add_argument("--schedules", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--output", type=Path, default=Path("runs/compare_stages"))
    parser.add_argument("--test", type=Path, help="JSONL to ask instead of the recipe's eval rows")
    parser.add_argument("--max_questions", type=int, default=2000, help="the first so many rows (default: 2000)")
    options, flags = parser.parse_known_args()
    recipe = recipe_of(options.recipe, flags)
    rows = questions(options.test, recipe, options.max_questions)
    results = Results(options.output / "results.json", options.test, options.max_questions)
    table: list[tuple[str, list[dict[str, float]]]] = []
    teacher = recipe.written.get("teacher")
    if teacher is not None:
        table.append(("teacher", [results.get(Path(teacher), rows, teacher)]))
    for schedule in options.schedules:
        runs = []
        for seed in options.seeds:
            begun = time.monotonic()
            last, steps, identity = run_schedule(recipe, schedule, seed, options.output)
            seconds = time.monotonic() - begun
            runs.append({**results.get(last, rows, identity), "steps": float(steps)})
            print(f"{schedule}, seed {seed}: {runs[-1]['accuracy']:.4f} ({seconds:.0f} s)", flush=True)
        table.append((schedule, runs))
    show(table, options.seeds, len(rows))


def questions(test: Path | None, recipe: Recipe, limit: int) -> list[dict[str, Any]]:
    """Rows with messages and images: of a file, or of the recipe's eval split."""
    if test is not None:
        return [json.loads(line) for line in test.read_text(encoding="utf-8").splitlines()[:limit]]
    data = load_rows_of(recipe.with_(max_eval_rows=limit).parse())["eval"]
    return [dict(row) for row in data]  # pyright: ignore[reportArgumentType]


def run_schedule(recipe: Recipe, schedule: str, seed: int, output: Path) -> tuple[Path, int, str]:
    """Trains what is missing of a schedule; its last stage's folder, all its updates, and its identity."""
    names, _, settings = schedule.partition(":")
    changed = edited(recipe, dict(one.split("=") for one in settings.split(",") if one), output)
    tail = settings.replace("=", "_").replace(",", "-")
    # Folders of equal beginnings could be shared; each schedule has its own, so that none waits for another.
    folder = output / f"{names}{'-' + tail if tail else ''}-seed{seed}"
    changed = changed.with_(schedule=names.split("-"), seed=seed, output_dir=str(folder))
    stages = plan(changed)
    steps = sum(int(stage.recipe.keys["max_steps"]) for stage in stages)
    share(stages, output)
    if train(changed):
        raise SystemExit(130)
    for stage in stages:
        known = output / "stages" / stage.identity
        known.parent.mkdir(parents=True, exist_ok=True)
        if not known.exists():
            known.symlink_to(os.path.relpath(stage.folder, known.parent))
    return stages[-1].folder, steps, stages[-1].identity


def share(stages: Sequence[Any], output: Path) -> None:
    """Links stages that an earlier schedule has trained in the same way."""
    for stage in stages:
        known = output / "stages" / stage.identity
        if known.exists() and not stage.folder.exists():
            stage.folder.parent.mkdir(parents=True, exist_ok=True)
            stage.folder.symlink_to(os.path.relpath(known.resolve(), stage.folder.parent))


def edited(recipe: Recipe, settings: dict[str, str], output: Path) -> Recipe:
    """The recipe with other settings in its distilled stages."""
    if not settings:
        return recipe
    keys = copy.deepcopy(dict(recipe.written))
    values = {key: yaml.safe_load(value) for key, value in settings.items()}
    for key, value in values.items():
        only, _, field = key.rpartition(".")
        for name, stage in keys["stages"].items():
            if name == only or (not only and stage.get("method", keys["method"]) != "sft"):
                stage[field] = value
    path = output / f"{Path(recipe.place).stem}-{'-'.join(f'{key}_{value}' for key, value in settings.items())}.yaml"
    return replace(replace(recipe, written=keys, overrides={}).write(path), overrides=recipe.overrides)


class Results:
    """Measurements by what was measured; written after each one."""

    def __init__(self, path: Path, test: Path | None, limit: int):
        self.path, self.what = path, f"{test or 'eval'} {limit}"
        self.known: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.is_file() else {}

    def get(self, folder: Path, rows: list[dict[str, Any]], identity: str) -> dict[str, float]:
        """The accuracy of a saved model, from the file or by asking it."""
        key = f"{identity} {self.what}"
        if key not in self.known:
            self.known[key] = measure(folder, rows)
            write_file(self.path, json.dumps(self.known, indent=1))
        return self.known[key]


def measure(folder: Path, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Accuracy of greedy answers, and of those to questions that are not answered yes or no."""
    said = answers(folder, rows)
    wanted = [row["messages"][-1]["content"][0]["text"] for row in rows]
    right = [ours == theirs for ours, theirs in zip(said, wanted, strict=True)]
    open_ended = [good for good, answer in zip(right, wanted, strict=True) if answer not in ("yes", "no")]
    parameters = load_model(str(folder)).num_parameters()
    return {
        "accuracy": statistics.fmean(right),
        "open": statistics.fmean(open_ended or [0]),
        "parameters": float(parameters),
    }


@torch.no_grad()
def answers(folder: Path, rows: list[dict[str, Any]], batch: int = 128, tokens: int = 4) -> list[str]:
    """What a saved model answers to the first message of each row."""
    model: Any = load_model(str(folder)).eval()
    processor: Any = load_processing_class(str(folder))
    processor.tokenizer.padding_side = "left"
    found: list[str] = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        conversations = [[_with_images(row)] for row in part]
        inputs = processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"padding": True},
        )
        ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        found += [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    return found


def _with_images(row: dict[str, Any]) -> dict[str, Any]:
    message, images = row["messages"][0], iter(row["images"])
    content = [
        {"type": "image", "image": read_image(next(images))} if part["type"] == "image" else part
        for part in message["content"]
    ]
    return {"role": message["role"], "content": content}


def show(rows: list[tuple[str, list[dict[str, float]]]], seeds: Sequence[int], count: int) -> None:
    """One line per schedule: mean over seeds, with the standard deviation where there are several."""
    table = Table("", "parameters", "updates", "accuracy", "of it not yes or no")
    for name, runs in rows:
        steps = f"{runs[0]['steps']:.0f}" if "steps" in runs[0] else ""
        cells = [_spread([run[column] for run in runs]) for column in ("accuracy", "open")]
        table.add_row(name, f"{runs[0]['parameters']:,.0f}", steps, *cells)
    console = Console(width=120)
    console.print(table)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    console.print(f"{count} questions, seeds {list(seeds)}, mean ± standard deviation; {machine}")


def _spread(values: list[float]) -> str:
    mean = 100 * statistics.fmean(values)
    return f"{mean:.1f} %" if len(values) == 1 else f"{mean:.1f} ± {100 * statistics.stdev(values):.1f} %"


if __name__ == "__main__":
    main()
