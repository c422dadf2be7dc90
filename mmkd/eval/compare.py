"""Was distillation worth it? Teacher, SFT baseline and students over seeds, in one table."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmkd.errors import UserError
from mmkd.files import write_file
from mmkd.recipe.recipe import STAGE_KEYS, Recipe
from mmkd.results.machine import machine
from mmkd.results.tables import markdown
from mmkd.training.method import BASELINE_METHOD, METHODS

from .bootstrap import paired_bootstrap
from .evaluation import evaluate
from .harness import Settings
from .model import find_model
from .results import SCHEMA, to_json
from .suites import SuiteTask
from .trainings import Measured, Trainings, label, make_baseline

NAME, PAGE = "comparison.json", "comparison.md"


@dataclass(frozen=True)
class Metric:
    """A number of the trainer's evaluation."""

    title: str
    report: str
    """The report whose totals and counts it is a function of."""
    transform: Callable[[Any], Any] = lambda mean: mean
    higher_is_better: bool = False
    of_the_model: bool = False
    """Whether it says how good a model is, and not how near its teacher: there is then a retention."""


METRICS = {
    "perplexity": Metric("perplexity", "ce", lambda mean: np.exp(np.minimum(mean, 700.0)), of_the_model=True),
    "kl": Metric("KL to teacher (nats)", "kl"),
    "top1_agreement": Metric("top-1 agreement", "top1_agreement", higher_is_better=True),
    "bits_per_byte": Metric("bits per byte", "bits_per_byte", of_the_model=True),
    "chunk_gap": Metric("gap per chunk (nats)", "chunk_gap"),
    "chunk_kl": Metric("KL per chunk (nats)", "chunk_kl"),
}
"""What is shown of an evaluation that says it."""


@dataclass(frozen=True)
class Row:
    """A line of the comparison: one model, or one recipe over seeds."""

    name: str
    role: str
    """teacher, untrained, baseline or student."""
    recipe: str
    runs: list[Measured]
    tasks: list[list[dict[str, Any]]]
    """Per run, the entries of the suite's tasks."""


def compare(
    recipes: Sequence[Recipe],
    seeds: Sequence[int],
    output: Path,
    *,
    judge: Recipe | None = None,
    baseline: Recipe | Literal["none"] | None = None,
    tasks: Sequence[SuiteTask] = (),
    include: Sequence[str] = (),
    settings: Settings | None = None,
) -> dict[str, Any]:
    """The comparison as it is written to comparison.json; eval/README.md says what each field is.

    `judge` is the recipe whose trainer evaluates all students, by default each one's own. `baseline` is a recipe of
    method sft, by default the one among `recipes`, else one made of the first; "none" trains none. Raises UserError
    for recipes that train no tokens, or train several times.
    """
    for recipe in (*recipes, *([judge] if judge else [])):
        _check(recipe)
    first = judge or recipes[0]
    if judge is None and not METHODS[recipes[0].method].one_vocabulary:
        judge = recipes[0]
    trained = [(recipe, "baseline" if recipe.method == BASELINE_METHOD else "student") for recipe in recipes]
    if isinstance(baseline, Recipe):
        trained.insert(0, (baseline, "baseline"))
    elif baseline is None and all(role == "student" for _, role in trained):
        trained.insert(0, (make_baseline(recipes[0], output), "baseline"))
    if judge is None:
        _check_reading([recipe for recipe, _ in trained])
    trainings = Trainings(output, judge, bool(tasks))
    settings = settings or Settings()

    def asked(run: Measured) -> list[dict[str, Any]]:
        return evaluate(find_model(run.folder), tasks, settings, include=include) if tasks else []

    rows = []
    if first.parse().arguments.teacher is not None:
        run = trainings.get(first, "teacher")
        rows.append(Row("teacher", "teacher", first.name, [run], [asked(run)]))
    run = trainings.get(judge or recipes[0], "untrained")
    rows.append(Row("student, untrained", "untrained", first.name, [run], [asked(run)]))
    for recipe, role in trained:
        runs = [trainings.get(recipe.with_(seed=seed)) for seed in seeds]
        rows.append(Row(label(recipe), role, recipe.name, runs, [asked(run) for run in runs]))
    comparison = _summary(rows, seeds, recipes[0].flags(), judge.name if judge else None)
    write_file(output / NAME, to_json(comparison, indent=1) + "\n")
    write_file(output / PAGE, markdown(comparison))
    return comparison


def _check(recipe: Recipe) -> None:
    predicted = METHODS[recipe.method].predicts
    if predicted != "tokens":
        raise UserError(
            f"{recipe.name} predicts {predicted} and no tokens; scripts/compare_dho.py compares such students.",
            because="not built",
        )
    if METHODS[recipe.method].drive is not None:
        raise UserError(
            f"{recipe.name} consists of several trainings, as method {recipe.method} does, and a comparison is of "
            "single ones at equal tokens. Train it, and compare its student with `mmkd eval`.",
            because="not built",
        )
    if any(key in recipe.keys for key in STAGE_KEYS):
        raise UserError(
            f"{recipe.name} is trained in stages: scripts/compare_stages.py compares schedules, `mmkd eval` their "
            "students.",
            because="not built",
        )


def _check_reading(recipes: Sequence[Recipe]) -> None:
    """Raises UserError for recipes that read the held-out rows as different tokens."""
    (first, reading), *others = ((recipe.name, _reading(recipe)) for recipe in recipes)
    for name, other in others:
        differing = [key for key in reading if reading[key] != other[key]]
        if differing:
            values = ", ".join(f"{key} {reading[key]} and {other[key]}" for key in differing)
            raise UserError(
                f"{first} and {name} read the held-out rows as different tokens ({values}), so that their numbers "
                f"do not compare. Have one of them judge all students: --judge {first}.",
                because="meaning",
            )


def _reading(recipe: Recipe) -> dict[str, Any]:
    run = recipe.parse()
    args = run.training
    packed = args.packing if args.eval_packing is None else args.eval_packing
    facts = {"data": run.arguments.data, "max_eval_rows": run.arguments.max_eval_rows, "max_length": args.max_length}
    return facts | {"packing": packed, "packing_strategy": args.packing_strategy if packed else None}


def _summary(rows: Sequence[Row], seeds: Sequence[int], flags: Sequence[str], judge: str | None) -> dict[str, Any]:
    teacher = next((row for row in rows if row.role == "teacher"), None)
    baseline = next((row for row in rows if row.role == "baseline"), None)
    shown = [name for name in METRICS if all(name in run.metrics for row in rows for run in row.runs)]
    summaries = []
    for row in rows:
        metrics = {name: _spread([run.metrics[name] for run in row.runs]) for name in shown}
        scores = _scores(row)
        pairs = {name: {**metrics[name], **_facts(name)} for name in shown} | scores
        retention = {} if teacher is None else _retention(pairs, _scores(teacher), teacher, shown)
        gain = {}
        if baseline is not None and row.role == "student":
            gain = {name: _gain(row, baseline, name) for name in shown} | _task_gains(row, baseline)
        summaries.append(
            {
                "name": row.name,
                "role": row.role,
                "recipe": row.recipe,
                "folders": [run.folder for run in row.runs],
                "weights": [run.weights for run in row.runs],
                "parameters": row.runs[0].parameters,
                "tokens": [run.tokens for run in row.runs],
                "metrics": {name: pairs[name] for name in shown},
                "tasks": scores,
                "retention": retention,
                "flips": {} if teacher is None or row is teacher else _flips(row, teacher),
                "gain_over_sft": {name: interval for name, interval in gain.items() if interval is not None},
                "cost": _cost(row.runs),
                "cache": row.runs[0].cache,
            }
        )
    return {
        "schema": SCHEMA,
        "seeds": list(seeds),
        "flags": list(flags),
        "judge": judge,
        "machine": machine(),
        "rows": summaries,
    }


def _facts(name: str) -> dict[str, Any]:
    return {"title": METRICS[name].title, "higher_is_better": METRICS[name].higher_is_better}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": deviation, "values": list(values)}


def _scores(row: Row) -> dict[str, dict[str, Any]]:
    """`task metric` -> mean over seeds."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for entries in row.tasks:
        for score in (score for entry in entries for score in entry["scores"]):
            by_name.setdefault(_title(score), []).append(score)
    return {
        name: {
            **_spread([score["value"] for score in scores]),
            "title": name,
            "higher_is_better": scores[0]["higher_is_better"],
            "items": scores[0]["items"],
        }
        for name, scores in by_name.items()
    }


def _title(score: dict[str, Any]) -> str:
    return f"{score['task']} {score['metric'].removesuffix(',none')}"


def _retention(pairs: dict[str, Any], theirs: dict[str, Any], teacher: Row, shown: Sequence[str]) -> dict[str, float]:
    """Percent of the teacher's score that is kept; of what is better when lower, the teacher's over ours."""
    known = {name: teacher.runs[0].metrics[name] for name in shown if METRICS[name].of_the_model}
    known |= {name: score["mean"] for name, score in theirs.items()}
    retained = {}
    for name, value in known.items():
        if name in pairs and value and pairs[name]["mean"]:
            ratio = pairs[name]["mean"] / value
            retained[name] = 100 * (ratio if pairs[name]["higher_is_better"] else 1 / ratio)
    return retained


def _gain(row: Row, baseline: Row, name: str) -> dict[str, Any] | None:
    metric = METRICS[name]
    sides = [[run.items.get(metric.report) for run in side_row.runs] for side_row in (row, baseline)]
    if any(items is None for side in sides for items in side):
        return None
    return _interval(sides[0], sides[1], metric.transform, metric.higher_is_better)


def _task_gains(row: Row, baseline: Row) -> dict[str, dict[str, Any] | None]:
    scores = [score for entry in (row.tasks[0] if row.tasks else []) for score in entry["scores"]]
    gains = {}
    for score in scores:
        sides = [[_items(entries, score) for entries in side_row.tasks] for side_row in (row, baseline)]
        if all(items for side in sides for items in side):
            transform = (lambda mean: -mean / math.log(2)) if score["metric"].startswith("bits_per_byte") else _same
            gains[_title(score)] = _interval(sides[0], sides[1], transform, score["higher_is_better"])
    return gains


def _flips(row: Row, teacher: Row) -> dict[str, float]:
    """Share of a benchmark's items that one of student and teacher answers right and the other wrong.

    Equal scores can hide many (Dutta et al., 2024). Of the seeds' mean; of metrics that are right or wrong only.
    """
    flips = {}
    for score in (score for entry in (teacher.tasks[0] if teacher.tasks else []) for score in entry["scores"]):
        theirs = np.array(_items(teacher.tasks[0], score))
        if len(theirs) and np.isin(theirs[:, 0], (0, 1)).all() and (theirs[:, 1] == 1).all():
            ours = [np.array(_items(entries, score)) for entries in row.tasks]
            flips[_title(score)] = float(np.mean([items[:, 0] != theirs[:, 0] for items in ours]))
    return flips


def _same(mean: Any) -> Any:
    return mean


def _items(entries: Sequence[dict[str, Any]], score: dict[str, Any]) -> list[tuple[float, float]]:
    """(total, count) of every answer behind a score; none where its values have no mean."""
    entry = next(
        candidate for candidate in entries if any(_title(other) == _title(score) for other in candidate["scores"])
    )
    samples = map(json.loads, Path(entry["samples"]).read_text(encoding="utf-8").splitlines())
    metric, _, chosen = score["metric"].partition(",")
    values = [
        sample["metrics"][metric]
        for sample in sorted(samples, key=lambda sample: (sample["task"], sample["doc_id"]))
        if sample.get("filter", chosen) == chosen and metric in sample["metrics"]
    ]
    if all(isinstance(value, int | float) for value in values):
        return [(float(value), 1.0) for value in values]
    if metric == "bits_per_byte" and all(isinstance(value, list) and len(value) == 2 for value in values):
        return [(float(total), float(count)) for total, count in values]
    return []


def _interval(ours: Any, theirs: Any, transform: Callable[[Any], Any], higher: bool) -> dict[str, Any]:
    """The gain of ours over theirs, positive where ours is better, with its interval."""
    sign = 1 if higher else -1
    estimate = paired_bootstrap(np.array(ours), np.array(theirs), lambda mean: sign * transform(mean))
    return {"gain": estimate.value, "low": estimate.low, "high": estimate.high, "level": estimate.level}


def _cost(runs: Sequence[Measured]) -> dict[str, Any] | None:
    """The mean over seeds."""
    costs = [run.cost for run in runs if run.cost is not None]
    if not costs:
        return None
    means = {
        name: statistics.fmean(cost[name] for cost in costs)
        for name in ("hours", "seconds", "tokens_per_second", "teacher_tokens")
    }
    return {"unit": costs[0]["unit"], **means, "peak_memory_bytes": costs[0]["peak_memory_bytes"]}
