"""Runs comd and its controls over several seeds, and prints the accuracy on questions of no round, round by round.

    python scripts/compare_comd.py comd/easy_vqa --seeds 0 1 2 --test .cache/mmkd/easy_vqa/test.jsonl

The recipe has two stages, PT and CoMD; PT is trained once per seed. Controls have as many updates as comd, and as many
answers of the teacher: `random` (new instructions made of no parents), `unassessed` (parents from the whole pool),
`one-shot` (as many of the data's own instructions, one training) and `in rounds` (the same, trained as comd is). The
answer is what the student writes greedily, right if it is the data's answer word for word. `--test` is JSONL of
conversations with images; without it the recipe's eval rows are asked, which is what choices are made by. Every
finished measurement is kept in OUTPUT/results.json, and a killed run goes on.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from compare_stages import Results, questions
from rich.console import Console
from rich.table import Table

from mmkd.commands.train import train
from mmkd.methods.comd.round_plot import plot_rounds
from mmkd.methods.comd.round_report import read_rounds
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.recipe import Recipe

ARMS = ("comd", "random", "unassessed", "in rounds", "one-shot")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a recipe with the stages PT and CoMD, by name or path")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--output", type=Path, default=Path("runs/compare_comd"))
    parser.add_argument("--test", type=Path, help="JSONL to ask instead of the recipe's eval rows")
    parser.add_argument("--max_questions", type=int, default=4000, help="the first so many rows (default: 4000)")
    parser.add_argument("--plot", type=Path, help="a file to draw the rounds to; needs matplotlib")
    options, flags = parser.parse_known_args()
    recipe = recipe_of(options.recipe, flags)
    rows = questions(options.test, recipe, options.max_questions)
    results = Results(options.output / "results.json", options.test, options.max_questions)
    teacher = str(recipe.written["teacher"])
    table = [("teacher", [[results.get(Path(teacher), rows, teacher)["accuracy"]]])]
    reports = {}
    for arm in options.arms:
        runs = []
        for seed in options.seeds:
            begun = time.monotonic()
            folder = run_arm(recipe, arm, seed, options.output)
            found = read_rounds(folder)
            reports[f"{arm}#{seed}"] = found
            students = [folder / f"round-{one['round']}" / "student" for one in found]
            said = [results.get(one, rows, str(one))["accuracy"] for one in students]
            runs.append(said)
            shown = " ".join(f"{value:.4f}" for value in said)
            print(f"{arm}, seed {seed}: {shown} ({time.monotonic() - begun:.0f} s)", flush=True)
        table.append((arm, runs))
    show(table, options.seeds, len(rows))
    if options.plot is not None:
        plot_rounds(reports, options.plot)


def run_arm(recipe: Recipe, arm: str, seed: int, output: Path) -> Path:
    """Trains what is missing of an arm; the folder of its rounds."""
    pretrained = output / f"pt-seed{seed}"
    keys = {"schedule": ["PT"], "seed": seed, "output_dir": str(pretrained)}
    run(recipe.with_(**{**keys, **recipe.overrides}))
    folder = output / f"{arm.replace(' ', '-')}-seed{seed}"
    own = {"schedule": ["CoMD"], "seed": seed, "student": str(pretrained / "1-PT"), "output_dir": str(folder)}
    run(replace(recipe, overrides={**own, **settings(recipe, arm, seed, output)}))
    return folder / "1-CoMD"


def settings(recipe: Recipe, arm: str, seed: int, output: Path) -> dict[str, Any]:
    """The keys of an arm; those that need to know how much comd was answered look at its rounds."""
    if arm == "comd":
        return {}
    if arm == "random":
        return {"augmentor": "random"}
    if arm == "unassessed":
        return {"assessor": "none"}
    answers = read_rounds(output / f"comd-seed{seed}" / "1-CoMD")[-1]["pool"]
    fixed = {"assessor": "none", "augmentor": "none", "max_train_rows": answers}
    if arm == "in rounds":
        return fixed
    keys = recipe.stage("CoMD").written
    return {**fixed, "rounds": 0, "max_steps": (keys["rounds"] + 1) * keys["max_steps"]}


def run(recipe: Recipe) -> None:
    if train(recipe):
        raise SystemExit(130)


def show(rows: Sequence[tuple[str, list[list[float]]]], seeds: Sequence[int], count: int) -> None:
    """One line per arm, one column per round: the mean over seeds, with the standard deviation."""
    rounds = max(len(run) for _, runs in rows for run in runs)
    table = Table("", *(f"round {number}" for number in range(rounds)), "last")
    for name, runs in rows:
        cells = [_spread([run[number] for run in runs]) if number < len(runs[0]) else "" for number in range(rounds)]
        table.add_row(name, *(cells if len(runs[0]) > 1 else [""] * rounds), _spread([run[-1] for run in runs]))
    console = Console(width=140)
    console.print(table)
    console.print(f"{count} questions, seeds {list(seeds)}, mean ± standard deviation of the accuracy")


def _spread(values: list[float]) -> str:
    mean = 100 * statistics.fmean(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {100 * statistics.stdev(values):.1f}"


if __name__ == "__main__":
    main()
