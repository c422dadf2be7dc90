"""What students are worth that were pruned in different ways, before training and as they learn from the whole model.

    python -m scripts.pruned_students [--seeds 0 1 2] [--output runs/pruned_students]   # trains and prints the table

Students of equal size are cut out of SmolLM2-135M: narrower by activations, narrower by weights, and with fewer
layers, evenly spread. Each is trained with the recipe kd/pruned on the same tokens and measured on held-out rows:
before training, and after a fortieth, a quarter and all of the recipe's steps, which the table calls 0.1x, 1x and 4x.
What is finished is kept in --output.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from mmkd.files import write_file
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.recipe import Recipe
from mmkd.recipe.run import build_trainer

RECIPE = "kd/pruned"
WIDTH = {"student_hidden_size": 540, "student_intermediate_size": 832}
STUDENTS: dict[str, dict[str, Any]] = {
    "activations": {**WIDTH, "prune_importance": "activations"},
    "weights": {**WIDTH, "prune_importance": "weights"},
    "even layers": {"student_hidden_size": None, "student_intermediate_size": None, "student_layers": 18}
    | {"prune_importance": "weights"},
}
SHARES = {"before": 0.0, "0.1x": 0.1, "1x": 1.0, "4x": 4.0}


class AtSteps(TrainerCallback):
    """Does something behind some steps."""

    def __init__(self, steps: Collection[int], do: Callable[[int], None]):
        self.steps, self.do = steps, do

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if state.global_step in self.steps:
            self.do(state.global_step)


def recipe_for(student: str, seed: int, folder: Path, flags: list[str]) -> Recipe:
    """The recipe of a student; what a flag says wins."""
    recipe = recipe_of(RECIPE, flags).with_(seed=seed, data_seed=seed, output_dir=str(folder))
    gone = [key for key, value in STUDENTS[student].items() if value is None]
    own = {key: value for key, value in STUDENTS[student].items() if value is not None}
    return recipe.without(*gone).with_(**own)


def measured(recipe: Recipe) -> dict[str, dict[str, float]]:
    """Held-out loss, KL and parameters at every share of the training."""
    run = recipe.parse()
    trainer: Any = build_trainer(run)
    steps = run.training.max_steps
    marks = {round(steps * share / max(SHARES.values())): name for name, share in SHARES.items()}
    results: dict[str, dict[str, float]] = {}

    def measure(step: int) -> None:
        metrics = trainer.evaluate()
        results[marks[step]] = {
            "step": step,
            **{name: value for name, value in metrics.items() if isinstance(value, int | float)},
            "parameters": sum(weight.numel() for weight in trainer.model.parameters()),
        }

    measure(0)
    trainer.add_callback(AtSteps(marks, measure))
    trainer.train()
    return results


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """A line per student: parameters, and perplexity and KL to the teacher at each share, mean and range of seeds."""
    lines = [
        "| student | parameters | seeds |" + "".join(f" {name} |" for name in SHARES),
        "|---|---|---|" + "---|" * 4,
    ]
    for student in STUDENTS:
        runs = [value for key, value in results.items() if key.rpartition(" ")[0] == student]
        if not runs:
            continue
        cells = []
        for share in SHARES:
            losses = [math.exp(run[share]["eval_ce"]) for run in runs]
            divergences = [run[share]["eval_kl"] for run in runs]
            spread = f" ({min(losses):,.1f}-{max(losses):,.1f})" if len(losses) > 1 else ""
            cells.append(f" {statistics.mean(losses):,.1f}{spread}, KL {statistics.mean(divergences):.3f} |")
        size = runs[0]["before"]["parameters"] / 1e6
        lines.append(f"| {student} | {size:.1f} M | {len(runs)} |" + "".join(cells))
    return lines


def main() -> None:
    """Trains what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", default="runs/pruned_students")
    options, flags = parser.parse_known_args()
    folder = Path(options.output)
    path = folder / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    for seed in options.seeds:
        for student in STUDENTS:
            key = f"{student} {seed}"
            if key not in results:
                results[key] = measured(recipe_for(student, seed, folder / key.replace(" ", "_"), flags))
                folder.mkdir(parents=True, exist_ok=True)
                write_file(path, json.dumps(results, indent=1))
                print("\n".join(table(results)), flush=True)
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
