"""A log as one short line: which of its values are shown, under which names, and what the names mean."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mmkd.units import readable_time


@dataclass(frozen=True)
class Column:
    """A value of a log as a line shows it."""

    label: str
    meaning: str
    write: Callable[[float], str]
    but_not_beside: tuple[str, ...] = ()
    """Reports of which one is enough: where the log has any of them, this one is not shown."""


def _number(value: float) -> str:
    return f"{value:.4g}"


def _share(value: float) -> str:
    return f"{value:.1%}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


COLUMNS: dict[str, Column] = {
    "loss": Column("loss", "what training minimises", _number),
    "accuracy": Column("accuracy", "share of rows whose class is predicted right", _share),
    "kl": Column("kl", "KL divergence from teacher to student, nats per token", _number),
    "chunk_kl": Column("chunk_kl", "KL divergence from teacher to student, nats per chunk of text", _number),
    "visual_kl": Column("visual_kl", "KL divergence from teacher to student, nats per image token", _number),
    "ce": Column("ce", "cross-entropy on labelled rows, nats per row", _number, ("token_accuracy", "bits_per_byte")),
    "kd_labeled": Column("kd", "loss on the teacher's logits (by default KL) on labelled rows, nats per row", _number),
    "kd_unlabeled": Column("kd_unlabelled", "the same on unlabelled rows", _number),
    "kd_stages": Column("stages", "the same of inner stages, added up", _number),
    "aspects": Column("aspects", "cross-entropy of the answers to aspects, nats per question", _number),
    "top1_agreement": Column("agreement", "share of tokens where student and teacher predict the same one", _share),
    "teacher_agreement": Column("agreement", "share of rows where student and teacher predict the same class", _share),
    "token_accuracy": Column(
        "accuracy", "share of tokens that the student predicts right", _share, ("top1_agreement",)
    ),
    "ce_head_accuracy": Column("ce_head", "accuracy of the supervised head alone", _share),
    "kd_head_accuracy": Column("kd_head", "accuracy of the distillation head alone", _share),
    "seen_class_accuracy": Column("seen", "mean accuracy of the trained classes, by their texts", _share),
    "unseen_class_accuracy": Column("unseen", "mean accuracy of classes never seen, by their texts", _share),
    "bits_per_byte": Column("bits/byte", "cross-entropy of the student, in bits per byte of text", _number),
    "perplexity": Column("perplexity", "exp of the cross-entropy on the held-out rows", _number),
    "taid_t": Column("t", "share of the teacher in TAID's target, from 0 to 1", _number),
    "patch_cosine": Column("patches", "cosine between the patches of student and teacher", _number),
    "summary_cosine": Column("summary", "cosine between the summaries of student and teacher", _number),
    "reward": Column("reward", "mean reward of the student's own answers", _number),
    "rollout_length": Column("answer", "tokens per answer that the student wrote", _count),
    "supervised_tokens_per_second": Column("tokens/s", "supervised tokens per second, of all processes", _count),
}
"""Report -> its column, in the order of a line."""

DETAILS = {
    "ce",
    "divergence",
    "step_divergence",
    "student_entropy",
    "teacher_entropy",
    "chunk_gap",
    "aligned",
    "progress_loss",
}
"""Reports of an evaluation that its line leaves to the log on disk."""

GUARD = "guard_"
"""What begins the name of a guard in a log, where it warned."""

_CLOCK = {"runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "epoch", "step"}


def columns_of(log: Mapping[str, Any]) -> list[str]:
    """The reports that the lines of a training show, to judge by its first log."""
    return [name for name, column in COLUMNS.items() if name in log and log.keys().isdisjoint(column.but_not_beside)]


def training_line(log: Mapping[str, Any], columns: list[str], step: int, steps: int, left: float) -> str:
    """A training log in one line; every line has the same columns."""
    parts = [f"step {step:{len(str(steps))}}/{steps}", *cells(log, columns), f"left {readable_time(left)}"]
    return "   ".join(parts)


def cells(log: Mapping[str, Any], columns: list[str]) -> Iterator[str]:
    """Label and value of each column; as wide where the log lacks it."""
    for name in columns:
        column = COLUMNS[name]
        width = 7 if column.write is not _share else 6
        value = column.write(log[name]) if name in log else "-"
        yield f"{column.label} {value:<{width}}"


def measures_of(log: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """The measures of an evaluation by their labels; those that the caller computes (`compute_metrics`) among them."""
    measures = {name.removeprefix(f"{prefix}_"): value for name, value in log.items() if name.startswith(f"{prefix}_")}
    known = {*COLUMNS, *DETAILS, *_CLOCK}
    others = {name: _plain(value) for name, value in measures.items() if name not in known}
    return {COLUMNS[name].label: COLUMNS[name].write(measures[name]) for name in columns_of(measures)} | others


def evaluation_line(log: Mapping[str, Any], prefix: str, step: int) -> str:
    """The measures of an evaluation in one line."""
    parts = [f"{label} {value}" for label, value in measures_of(log, prefix).items()]
    seconds = log.get(f"{prefix}_runtime")
    took = [] if seconds is None else [f"in {readable_time(seconds)}"]
    title = {"eval": "evaluation", "test": "test"}.get(prefix, f"evaluation ({prefix.removeprefix('eval_')})")
    when = f"after step {step}" if step else "before training"
    return "   ".join([f"{title} {when}", *parts, *took])


def other_line(log: Mapping[str, Any], step: int) -> str:
    """Whatever else is logged, in one line."""
    values = [f"{name} {_plain(value)}" for name, value in log.items() if name not in _CLOCK]
    return "   ".join([f"step {step}", *values])


def legend(columns: list[str]) -> list[str]:
    """What the columns and the time left mean, one line each."""
    labels = [(COLUMNS[name].label, COLUMNS[name].meaning) for name in columns]
    labels.append(("left", "estimated time to the last step, evaluations included"))
    width = max(len(label) for label, _ in labels)
    return [f"  {label:<{width}}  {meaning}" for label, meaning in labels]


def evaluation_prefix(log: Mapping[str, Any]) -> str | None:
    """The prefix of an evaluation's log; None for any other log."""
    names = (name.removesuffix("_runtime") for name in log if name.endswith("_runtime"))
    return next((name for name in names if name != "train"), None)


def warnings_in(log: Mapping[str, Any]) -> dict[str, float]:
    """The guards that warned, and their values, in the log of a warning; it was said when it came up."""
    return {name.removeprefix(GUARD): value for name, value in log.items() if name.startswith(GUARD)}


def _plain(value: Any) -> str:
    return _number(value) if isinstance(value, float) else str(value)
