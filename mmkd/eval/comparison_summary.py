"""The numbers of a comparison: means over seeds, what is kept of the teacher, gains with intervals, cost."""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmkd.results.compared import ComparedModel, Metric
from mmkd.results.machine import machine
from mmkd.results.verdicts import verdict_of
from mmkd.training.comparison import Comparison

from .asked_questions import METRICS as OF_QUESTIONS
from .bootstrap import paired_bootstrap
from .own_answers import METRICS as OF_OWN_ANSWERS
from .results import SCHEMA

METRICS = {
    **OF_QUESTIONS,
    "perplexity": Metric("perplexity", "ce", lambda mean: np.exp(np.minimum(mean, 700.0)), of_the_model=True),
    "kl": Metric("KL to teacher (nats)", "kl"),
    "top1_agreement": Metric("top-1 agreement", "top1_agreement", higher_is_better=True),
    "bits_per_byte": Metric("bits per byte", "bits_per_byte", of_the_model=True),
    "chunk_gap": Metric("gap per chunk (nats)", "chunk_gap"),
    "chunk_kl": Metric("KL per chunk (nats)", "chunk_kl"),
    **OF_OWN_ANSWERS,
}
"""What is shown of an evaluation that says it."""


@dataclass(frozen=True)
class Row:
    """A line of the comparison: one model, or one recipe over seeds."""

    name: str
    role: str
    """teacher, untrained, baseline, control or student."""
    recipe: str
    runs: list[ComparedModel]
    tasks: list[list[dict[str, Any]]]
    """Per run, the entries of the suite's tasks."""


def summary(
    rows: Sequence[Row],
    seeds: Sequence[int],
    flags: Sequence[str],
    judge: str | None,
    method: Comparison,
) -> dict[str, Any]:
    """The comparison as it is written to comparison.json; `method` says what its own measure tells."""
    known = {**METRICS, **method.metrics}
    teacher = next((row for row in rows if row.role == "teacher"), None)
    baseline = next((row for row in rows if row.role == "baseline"), None)
    shown = {name: known[name] for name in known if all(name in run.metrics for row in rows for run in row.runs)}
    named = "SFT" if method.baseline_name is None else method.baseline_name
    summaries = []
    for row in rows:
        metrics = {name: _told(metric, [run.metrics[name] for run in row.runs]) for name, metric in shown.items()}
        scores = _scores(row)
        pairs = metrics | scores
        gain = {}
        if baseline is not None and row.role in ("student", "control"):
            found = {name: gain_between(row.runs, baseline.runs, metric) for name, metric in shown.items()}
            gain = found | _task_gains(row, baseline)
        gain = {name: interval for name, interval in gain.items() if interval is not None}
        retention = {} if teacher is None else _retention(pairs, _scores(teacher), teacher, shown)
        further = _further(row, {name: own for name, own in method.metrics.items() if name not in shown})
        summaries.append(
            {
                "name": row.name,
                "role": row.role,
                "recipe": row.recipe,
                "folders": [run.folder for run in row.runs],
                "weights": [run.weights for run in row.runs],
                "parameters": row.runs[0].parameters,
                "tokens": [run.tokens for run in row.runs],
                "metrics": metrics,
                "tasks": scores,
                "retention": retention,
                "flips": {} if teacher is None or row is teacher else _flips(row, teacher),
                "gain_over_sft": gain,
                "cost": _cost(row.runs),
                "cache": row.runs[0].cache,
                **({"further": further} if further else {}),
            }
        )
    counting = [*(name for score in summaries[:1] for name in score["tasks"]), *_first_of_the_model(shown)]
    students = [row for row in summaries if row["role"] == "student"]
    return {
        "schema": SCHEMA,
        "seeds": list(seeds),
        "flags": list(flags),
        "judge": judge,
        "machine": machine(),
        "baseline": named,
        "items": method.items,
        "measured_on": rows[0].runs[0].measured_on,
        "verdicts": [text for row in students if (text := verdict_of(row, counting, named, len(seeds))) is not None],
        "rows": summaries,
    }


def first_of(model: ComparedModel, method: Comparison) -> str:
    """The measure of a model that counts most, in words."""
    known = {**METRICS, **method.metrics}
    name = _first_of_the_model({name: metric for name, metric in known.items() if name in model.metrics})[0]
    return f"{known[name].title} {model.metrics[name]:.4g}"


def _first_of_the_model(shown: Mapping[str, Metric]) -> list[str]:
    """The measures, the ones that count first, by which it is said whether distilling was worth it."""
    return sorted(shown, key=lambda name: not shown[name].of_the_model)


def _further(row: Row, metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """What is not known of every row: other measures of the method, and students on the way."""
    told = {name: metric for name, metric in metrics.items() if all(name in run.metrics for run in row.runs)}
    further = {name: _told(metric, [run.metrics[name] for run in row.runs]) for name, metric in told.items()}
    shared = [name for name in row.runs[0].along if all(name in run.along for run in row.runs)]
    along = {name: Metric(name, higher_is_better=True) for name in shared}
    return further | {name: _told(metric, [run.along[name] for run in row.runs]) for name, metric in along.items()}


def _told(metric: Metric, values: Sequence[float]) -> dict[str, Any]:
    return {**_spread(values), "title": metric.title, "higher_is_better": metric.higher_is_better}


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


def _retention(
    pairs: Mapping[str, Any], theirs: Mapping[str, Any], teacher: Row, shown: Mapping[str, Metric]
) -> dict[str, float]:
    """Percent of the teacher's score that is kept; of what is better when lower, the teacher's over ours."""
    known = {name: teacher.runs[0].metrics[name] for name, metric in shown.items() if metric.of_the_model}
    known |= {name: score["mean"] for name, score in theirs.items()}
    retained = {}
    for name, value in known.items():
        if name in pairs and value and pairs[name]["mean"]:
            ratio = pairs[name]["mean"] / value
            retained[name] = 100 * (ratio if pairs[name]["higher_is_better"] else 1 / ratio)
    return retained


def gain_between(
    ours: Sequence[ComparedModel], theirs: Sequence[ComparedModel], metric: Metric
) -> dict[str, Any] | None:
    """By how much ours are better, seed by seed, with an interval; None where the metric is no mean over items."""
    sides = [[run.items.get(metric.report) for run in runs] for runs in (ours, theirs)]
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


def _cost(runs: Sequence[ComparedModel]) -> dict[str, Any] | None:
    """The mean over seeds."""
    costs = [run.cost for run in runs if run.cost is not None]
    if not costs:
        return None
    names = ("hours", "seconds", "tokens_per_second")
    means = {name: statistics.fmean(cost[name] for cost in costs) for name in names}
    asked = [cost["teacher_tokens"] for cost in costs]
    teacher = {"teacher_tokens": None if None in asked else statistics.fmean(asked)}
    return {"unit": costs[0]["unit"], **means, **teacher, "peak_memory_bytes": costs[0]["peak_memory_bytes"]}
