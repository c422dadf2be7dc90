"""The measures that count: of the student before and after, of its teacher and of the SFT baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmkd.results.scores import scores_of
from mmkd.results.verdicts import verdict_of

from .runs import BEFORE_RESULTS, TEACHER_RESULTS, RunFiles

NOT_MEASURED = "not measured"

BENCHMARKS = 3
"""Benchmarks in the summary; the table of benchmarks has them all."""


@dataclass(frozen=True)
class HeldOutMeasure:
    """A number that a trainer's evaluation logs."""

    title: str
    higher_is_better: bool = False
    of_teacher: str = NOT_MEASURED
    """The teacher's own value where it follows from the definition."""


HELD_OUT = {
    "accuracy": HeldOutMeasure("accuracy", True),
    "bits_per_byte": HeldOutMeasure("bits per byte"),
    "image_to_text_recall": HeldOutMeasure("image to text recall@1", True),
    "text_to_image_recall": HeldOutMeasure("text to image recall@1", True),
    "perplexity": HeldOutMeasure("perplexity"),
    "kl": HeldOutMeasure("KL to the teacher (nats)", of_teacher="0"),
    "chunk_kl": HeldOutMeasure("KL per chunk (nats)", of_teacher="0"),
    "top1_agreement": HeldOutMeasure("top-1 agreement with the teacher", True, of_teacher="1"),
    "patch_cosine": HeldOutMeasure("cosine to the teacher's patches", True, of_teacher="1"),
    "summary_cosine": HeldOutMeasure("cosine to the teacher's summary", True, of_teacher="1"),
}


@dataclass(frozen=True)
class Measured:
    """A table of measures, and what it means."""

    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    notes: Sequence[str] = field(default_factory=list)
    verdict: Sequence[str] = field(default_factory=list)


def measured_by_comparison(comparison: Mapping[str, Any], students: Sequence[Mapping[str, Any]]) -> Measured:
    """The models of a comparison: the student before, the baseline, the given students and the teacher."""
    rows, baseline = comparison["rows"], comparison.get("baseline", "SFT")
    columns: list[tuple[str, Mapping[str, Any]]] = []
    columns += [("before", row) for row in rows if row["role"] == "untrained"]
    others = [row for row in rows if row["role"] == "baseline" and row not in students]
    columns += [(f"after, {baseline}", row) for row in others[:1]]
    columns += [(f"after, {row['name']}", row) for row in students]
    columns += [("teacher", row) for row in rows if row["role"] == "teacher"]
    gains = students[0]["gain_over_sft"] if len(students) == 1 else {}
    lines = []
    for kind, most in (("tasks", BENCHMARKS), ("metrics", len(HELD_OUT))):
        names = list(dict.fromkeys(name for _, row in columns for name in row[kind]))[:most]
        for name in names:
            shown = next(row[kind][name] for _, row in columns if name in row[kind])
            cells = [_mean(row[kind][name]) if name in row[kind] else NOT_MEASURED for _, row in columns]
            gain = [_gain(gains[name]) if name in gains else ""] if gains else []
            lines.append([_titled(shown["title"], shown["higher_is_better"]), *cells, *gain])
    header = ["measure", *(title for title, _ in columns), *([f"gain over {baseline}, 95 %"] if gains else [])]
    seeds = comparison["seeds"]
    notes = [f"Mean ± standard deviation of {len(seeds)} seeds."] if len(seeds) > 1 else []
    notes += ["A positive gain is better."] if gains else []
    notes += [f"Measured on {comparison['measured_on']}."] if comparison.get("measured_on") else []
    return Measured(header, lines, notes, _verdicts(comparison, students))


def _gain(gain: Mapping[str, Any]) -> str:
    return f"{gain['gain']:+.3g} [{gain['low']:+.3g}, {gain['high']:+.3g}]"


def _verdicts(comparison: Mapping[str, Any], students: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the comparison says of the students; comparisons of earlier versions kept their numbers only."""
    if "verdicts" in comparison:
        starts = tuple(f"{row['name']}{after}" for row in students for after in (": ", " is "))
        return [verdict for verdict in comparison["verdicts"] if verdict.startswith(starts)]
    verdicts = [
        verdict_of(row, [*row["tasks"], *HELD_OUT], comparison.get("baseline", "SFT"), len(comparison["seeds"]))
        for row in students
    ]
    return [verdict for verdict in verdicts if verdict is not None]


def measured_by_run(run: RunFiles, has_teacher: bool) -> Measured:
    """Benchmarks, the rounds' score and the trainer's evaluation of one run."""
    lines = [*_benchmarks(run), *_rounds(run), *_evaluations(run)]
    notes = ["On held-out rows of the run's data. `mmkd compare` adds intervals over rows and seeds."] if lines else []
    if any("±" in cell for line in lines for cell in line):
        notes.append("± is the standard error of a benchmark.")
    if any(line[1] == NOT_MEASURED for line in lines) and _same_data(run) and not run.rounds:
        notes.append("`eval_on_start: true` in the recipe measures the student before training too.")
    if not lines:
        notes.append("Nothing is measured on held-out rows yet. `mmkd eval` measures a finished student.")
    header = ["measure", "before", "after", *(["teacher"] if has_teacher else [])]
    return Measured(header, [line[: len(header)] for line in lines], notes)


def _benchmarks(run: RunFiles) -> list[list[str]]:
    """The benchmarks of the student's results, the first ones."""
    scores: dict[tuple[str, str], dict[str, str]] = {}
    for name, result in run.results.items():
        for score in (score for entry in result["tasks"].values() for score in scores_of(entry)):
            title = f"{score['task']} {score['metric'].removesuffix(',none')}"
            error = "" if score["stderr"] is None else f" ± {score['stderr']:.3g}"
            key = (_titled(title, score["higher_is_better"]), score["metric"])
            scores.setdefault(key, {})[name] = f"{score['value']:.3f}{error}"
    sides = (BEFORE_RESULTS, run.folder.name, TEACHER_RESULTS)
    own = {title: cells for (title, _), cells in scores.items() if run.folder.name in cells}
    lines = [[title, *(cells.get(side, NOT_MEASURED) for side in sides)] for title, cells in own.items()]
    return lines[:BENCHMARKS]


def _rounds(run: RunFiles) -> list[list[str]]:
    """The match with held-out answers after the last round of a loop."""
    scored = [round_["held_out"] for round_ in run.rounds if round_.get("held_out")]
    if not scored:
        return []
    last = scored[-1]
    title = _titled(f"held-out answers, {last.get('metric', 'match')}", True)
    return [[title, NOT_MEASURED, f"{last['student']:.3f}", f"{last['teacher']:.3f}"]]


def _evaluations(run: RunFiles) -> list[list[str]]:
    """First and last evaluation of a run; the first one only where nothing was trained before it."""
    parts = run.own_parts
    last = [entry for part in parts[-1:] for entry in part.log if "eval_loss" in entry or "eval_accuracy" in entry]
    first = [entry for entry in (parts[0].log if parts and _same_data(run) else []) if entry.get("step") == 0]
    lines = []
    for name, measure in {**HELD_OUT, **_of_each_teacher(last)}.items():
        after = next((entry[f"eval_{name}"] for entry in reversed(last) if f"eval_{name}" in entry), None)
        before = next((entry[f"eval_{name}"] for entry in first if f"eval_{name}" in entry), None)
        if after is not None or before is not None:
            # An evaluation before the first step is none after training.
            after = None if after is before and len(last) == 1 else after
            title = _titled(measure.title, measure.higher_is_better)
            lines.append([title, _number(before), _number(after), measure.of_teacher])
    return lines


def _of_each_teacher(log: Sequence[Mapping[str, Any]]) -> dict[str, HeldOutMeasure]:
    """The measures that a training with several teachers has for each of them."""
    titles = {"patch_cosine_": "cosine to the patches of", "summary_cosine_": "cosine to the summary of"}
    names = dict.fromkeys(name.removeprefix("eval_") for entry in log for name in entry)
    return {
        name: HeldOutMeasure(f"{title} {name.removeprefix(start)}", True, of_teacher="1")
        for name in names
        for start, title in titles.items()
        if name.startswith(start)
    }


def _same_data(run: RunFiles) -> bool:
    """Whether all stages are evaluated on the same rows, so that the first can say what the student was before."""
    return len({str(record.get("data")) for record in run.stages.values()}) <= 1


def _titled(title: str, higher_is_better: bool) -> str:
    return f"{title} {'↑' if higher_is_better else '↓'}"


def _number(value: float | None) -> str:
    return NOT_MEASURED if value is None else _short(value)


def _mean(metric: Mapping[str, Any]) -> str:
    deviation = "" if metric["std"] is None else f" ± {metric['std']:.2g}"
    return f"{_short(metric['mean'])}{deviation}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"
