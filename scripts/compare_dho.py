"""DHO beside its baselines on a recipe's data: accuracy on the test split for several numbers of labels per class.

    python scripts/compare_dho.py dho/fashion_mnist --labels 1 2 4 8 16 --seeds 0 1 2 --plot conflict.png

Rows of the table: the teacher; labels only; the teacher only; one head with both losses, trained once for every
lambda of --lambdas, of which validation chooses one; DHO, trained once, whose alpha and beta validation chooses.
"4 per class" makes the same choices by four validation rows of each class, not all; "no choice" is lambda 0.5, or
alpha and beta 0.5. The test split enters nothing but the numbers that are printed. A seed decides the labels
shown, the student's weights and the batches. Every finished run is kept in OUTPUT/results.json; repeat the command
to go on.
"""

import argparse
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.trainer_utils import set_seed

from mmkd.data.classification import ClassificationRecipe, hide_labels, load_classification
from mmkd.files import write_file
from mmkd.losses.dual_head_losses import ALPHAS, BETAS, interpolate, search_interpolation
from mmkd.methods.dho.class_run import Classes
from mmkd.methods.dho.class_teacher import load_class_teacher
from mmkd.methods.dho.dho_build import build_dho_trainer, new_student
from mmkd.methods.dho.dho_trainer import DHOTrainer
from mmkd.recipe.flags import recipe_of
from mmkd.teachers.class_logits import compute_class_logits

Answers = dict[str, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--labels", nargs="+", type=int, default=[1, 2, 4, 8, 16], help="labels per class")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lambdas", nargs="+", type=float, default=[0.25, 0.5, 0.75], help="of the single head")
    parser.add_argument("--output", type=Path, default=Path("runs/compare_dho"))
    parser.add_argument("--plot", type=Path, help="draw the gradients' cosine to this file (needs matplotlib)")
    options, flags = parser.parse_known_args()
    options.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.recipe, flags, options.output)
    kinds = [("dho", 0.5), ("ce", 0.5), ("kd", 0.5), *(("single_head", weight) for weight in options.lambdas)]
    wanted = [(o, w, n, s) for s in options.seeds for n in options.labels for o, w in kinds]
    for number, one in enumerate(wanted, start=1):
        bench.get(*one)
        print(f"{number} of {len(wanted)} runs", flush=True)
    show(bench, options.labels, options.seeds, options.lambdas)
    if options.plot is not None:
        from mmkd.methods.dho.conflict_plot import plot_conflict

        shown = options.labels[len(options.labels) // 2]
        lines = {"DHO: two heads": "dho", "one head, lambda 0.5": "single_head"}
        runs = {f"{t}#{s}": bench.get(o, 0.5, shown, s)["log"] for t, o in lines.items() for s in options.seeds}
        plot_conflict(runs, options.plot)


class Bench:
    """Runs of one recipe that share prepared images and the teacher's logits; finished ones by what they ran."""

    def __init__(self, recipe: str, flags: list[str], output: Path):
        self.recipe, self.flags, self.output = recipe, flags, output
        self.path = output / "results.json"
        self.known: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self.base: DHOTrainer | None = None

    def get(self, objective: str, weight: float, labels: int, seed: int) -> dict[str, Any]:
        """The measurements of one run, from the file or by running it."""
        key = " ".join([self.recipe, *self.flags, objective, str(weight), str(labels), str(seed)])
        if key not in self.known:
            self.known[key] = self._run(objective, weight, labels, seed)
            self._save()
        return self.known[key]

    def teacher_accuracy(self) -> float:
        """Of the zero-shot teacher on the test split."""
        key = " ".join([self.recipe, *self.flags, "teacher"])
        if key not in self.known:
            run = recipe_of(self.recipe, self.flags).parse()
            data = load_classification(ClassificationRecipe.load(run.arguments.data))
            rows = self._shared().test_dataset
            assert rows is not None
            logits = compute_class_logits(load_class_teacher(run, Classes(data, rows)), rows.raw, len(rows))
            self.known[key] = (logits.argmax(-1) == torch.as_tensor(rows.labels)).float().mean().item()
            self._save()
        return self.known[key]

    def _save(self) -> None:
        write_file(self.path, json.dumps(self.known))

    def _shared(self) -> DHOTrainer:
        if self.base is None:
            self.base = build_dho_trainer(recipe_of(self.recipe, [*self.flags, "--labels_per_class", "1"]).parse())
        return self.base

    def _run(self, objective: str, weight: float, labels: int, seed: int) -> dict[str, Any]:
        shared = self._shared()
        chosen = {"objective": objective, "ce_weight": weight, "labels_per_class": labels, "seed": seed}
        chosen |= {"label_seed": seed, "disable_tqdm": True, "output_dir": str(self.output / "run")}
        flags = [part for key, value in chosen.items() for part in (f"--{key}", str(value))]
        run = recipe_of(self.recipe, [*self.flags, *flags]).parse()
        data = load_classification(ClassificationRecipe.load(run.arguments.data))
        set_seed(seed)
        everything = shared.train_dataset.relabeled(torch.tensor(data.train["label"]).numpy())
        trainer = DHOTrainer(
            model=new_student(run, data),
            teacher=None if objective == "ce" else shared.data_collator.teacher_logits,  # pyright: ignore
            args=run.training,  # pyright: ignore[reportArgumentType]
            train_dataset=everything,
            eval_dataset=shared.eval_dataset,
            processing_class=shared.processing_class,
        )
        seconds = trainer.train().metrics["train_runtime"]
        test, validation = self._answers(trainer, shared.test_dataset), self._answers(trainer, shared.eval_dataset)
        few = hide_labels(validation["labels"].tolist(), data.class_names, 4, None, seed) >= 0
        some = {name: values[torch.as_tensor(few)] for name, values in validation.items()}
        result: dict[str, Any] = {"seconds": seconds, "log": trainer.state.log_history}
        if objective == "dho":
            for name, rows in (("all", validation), ("few", some)):
                found = search_interpolation(rows["ce"], rows["kd"], rows["labels"], ALPHAS, BETAS)
                result[name] = {"alpha": found.alpha, "beta": found.beta, "validation": found.accuracy}
                result[name]["test"] = _accuracy(test, found.alpha, found.beta)
            result["none"] = {"test": _accuracy(test, 0.5, 0.5)}
            result["ce_head"], result["kd_head"] = _accuracy(test, 1, 1), _accuracy(test, 0, 1)
        else:
            alpha = 0 if objective == "kd" else 1
            result["test"] = _accuracy(test, alpha, 1)
            result["validation"] = {"all": _accuracy(validation, alpha, 1), "few": _accuracy(some, alpha, 1)}
        return result

    def _answers(self, trainer: DHOTrainer, rows: Any) -> Answers:
        output = trainer.predict(rows)
        ce, kd = (torch.as_tensor(logits) for logits in output.predictions)
        return {"ce": ce, "kd": kd, "labels": torch.as_tensor(output.label_ids)}


def _accuracy(answers: Answers, alpha: float, beta: float) -> float:
    logits = interpolate(answers["ce"], answers["kd"], alpha, beta)
    return (logits.argmax(-1) == answers["labels"]).float().mean().item()


def show(bench: Bench, labels: list[int], seeds: list[int], lambdas: list[float]) -> None:
    """One row per method, one column per number of labels: percent of the test split, mean ± standard deviation."""

    def single(chosen_by: str, count: int, seed: int) -> float:
        runs = [bench.get("single_head", weight, count, seed) for weight in lambdas]
        # max() keeps the first of equals, the smallest lambda.
        return max(runs, key=lambda run: run["validation"][chosen_by])["test"]

    methods = {
        "labels only (CE)": lambda n, s: bench.get("ce", 0.5, n, s)["test"],
        "teacher only (KD)": lambda n, s: bench.get("kd", 0.5, n, s)["test"],
        f"one head, best of {len(lambdas)} lambdas": lambda n, s: single("all", n, s),
        "DHO": lambda n, s: bench.get("dho", 0.5, n, s)["all"]["test"],
        "one head, 4 per class": lambda n, s: single("few", n, s),
        "DHO, 4 per class": lambda n, s: bench.get("dho", 0.5, n, s)["few"]["test"],
        "one head, no choice": lambda n, s: bench.get("single_head", 0.5, n, s)["test"],
        "DHO, no choice": lambda n, s: bench.get("dho", 0.5, n, s)["none"]["test"],
        "DHO, supervised head alone": lambda n, s: bench.get("dho", 0.5, n, s)["ce_head"],
        "DHO, distillation head alone": lambda n, s: bench.get("dho", 0.5, n, s)["kd_head"],
    }
    table = Table("", *(f"{count} per class" for count in labels), title=bench.recipe)
    table.add_row("teacher, zero-shot", *[f"{100 * bench.teacher_accuracy():.1f}"] * len(labels))
    for name, value in methods.items():
        table.add_row(name, *(_spread([100 * value(count, seed) for seed in seeds]) for count in labels))
    for key in ("alpha", "beta"):
        cells = [" ".join(f"{bench.get('dho', 0.5, n, s)['all'][key]:g}" for s in seeds) for n in labels]
        table.add_row(f"DHO, chosen {key}", *cells)
    for name, objective in (("DHO", "dho"), ("one head", "single_head")):
        cells = [_spread([_cosine(bench.get(objective, 0.5, n, s)["log"]) for s in seeds], 2) for n in labels]
        table.add_row(f"{name}: gradients' cosine", *cells)
    console = Console(width=130)
    console.print(table)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    console.print(f"test accuracy in percent, seeds {seeds}, mean ± standard deviation; {machine}")


def _cosine(log: list[dict[str, Any]]) -> float:
    return statistics.fmean(entry["gradient_cosine"] for entry in log if "gradient_cosine" in entry)


def _spread(values: list[float], digits: int = 1) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    main()
