"""What a run's report opens with: who taught whom, on what, how much of it was learnt, and what that cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmkd.recipe.prune_arguments import SIZES, TARGETS, UNPRUNED
from mmkd.results.own_teacher import SELF, own_form
from mmkd.results.parameters import parameters_of
from mmkd.training.method import BASELINE_METHOD
from mmkd.units import readable_count, readable_time

from .measured import measured_by_comparison, measured_by_run
from .runs import RunFiles, record_of, shown_rows, tokens_of


@dataclass(frozen=True)
class Summary:
    """The facts of the box, as text."""

    teacher: str
    """Its name; empty for a run without one."""
    student: str
    facts: Sequence[tuple[str, str]]
    """Label and value."""
    header: Sequence[str]
    """Of the table of measures: measure, before, ..., teacher."""
    lines: Sequence[Sequence[str]]
    notes: Sequence[str]
    verdict: Sequence[str] = field(default_factory=list)
    """What the comparison says of each student."""


def summary_of(run: RunFiles) -> Summary | None:
    """The summary of a run; None for a folder that only holds results."""
    records = _records(run)
    keys = [record["keys"] for record in records if "keys" in record]
    if not keys and run.comparison is None:
        return None
    teachers = _teachers(keys)
    itself = next(filter(None, map(own_form, keys)), "")
    if run.comparison is not None:
        measured = measured_by_comparison(run.comparison, shown_rows(run.comparison, run.folder))
    else:
        measured = measured_by_run(run, bool(teachers))
    facts = [
        ("Method", ", ".join(dict.fromkeys(str(own["method"]) for own in keys if "method" in own))),
        ("Data", ", ".join(dict.fromkeys(_data(records)))),
        ("Start", _start(keys)),
        ("Parameters", _parameters(run, teachers, keys)),
        ("Cost", _cost(run)),
    ]
    return Summary(
        " + ".join(itself if name == SELF else short_name(name) for name in teachers),
        _student(run),
        [(label, value) for label, value in facts if value],
        measured.header,
        measured.lines,
        measured.notes,
        measured.verdict,
    )


def _records(run: RunFiles) -> list[dict[str, Any]]:
    """The records of the stages, of the run, or of the students that a comparison's folder holds."""
    if run.stages or run.comparison is None:
        return list(run.stages.values()) or ([run.record] if run.record else [])
    folders = [Path(row["folders"][0]) for row in shown_rows(run.comparison, run.folder)]
    records = [record for folder in folders if folder.is_dir() and (record := record_of(folder))]
    return records or ([run.record] if run.record else [])


def short_name(name: str) -> str:
    """A Hub id as it is; of a folder the last part, or the last two where that is a stage."""
    path = Path(name)
    if name.count("/") == 1 and not name.startswith((".", "/")) and not path.is_dir():
        return name
    parts = [part for part in path.parts if part not in ("/", ".", "..")]
    is_stage = parts[-1:] and parts[-1][:1].isdigit() and "-" in parts[-1]
    return "/".join(parts[-2:] if is_stage else parts[-1:]) or name


def _teachers(keys: Sequence[Mapping[str, Any]]) -> list[str]:
    """The teachers of all trainings; those of SFT, which only compare, where there are no others."""
    for chosen in ([own for own in keys if own.get("method") != BASELINE_METHOD], keys):
        named = [each for own in chosen for each in (own, *_several(own)) if each.get("teacher")]
        if named:
            return list(dict.fromkeys(str(own["teacher"]) for own in named))
    return []


def _several(keys: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    teachers = keys.get("teachers")
    return list(teachers.values()) if isinstance(teachers, Mapping) else []


def _student(run: RunFiles) -> str:
    if run.comparison is not None:
        names = [row["name"] for row in shown_rows(run.comparison, run.folder)]
        return ", ".join(names) or run.name
    return run.name


def _start(keys: Sequence[Mapping[str, Any]]) -> str:
    """Where the student's first weights come from."""
    if not keys:
        return ""
    first = keys[0]
    init, named = first.get("student_init", "pretrained"), first.get("student") or first.get("teacher")
    name = short_name(str(named)) if named else ""
    if init == "random":
        return f"random weights, shaped like {name}"
    if init == "llava":
        return f"{name} with the vision tower {short_name(str(first.get('student_vision_tower', '')))}"
    if init == "prune":
        return f"{name}, pruned{_pruning(first)}"
    return name


def _pruning(keys: Mapping[str, Any]) -> str:
    """To which sizes, and by what."""
    kept = [f"{key.removeprefix('student_')} {keys[key]}" for key in (*SIZES, *TARGETS) if keys.get(key) is not None]
    importance, layers = keys.get("prune_importance", "weights"), keys.get("prune_layer_importance", "even")
    by = [importance] if importance != "weights" else []
    by += [f"{layers.replace('_', ' ')} of layers"] if layers != "even" else []
    rows = keys.get("prune_calibration_rows", UNPRUNED["prune_calibration_rows"])
    how = f", chosen by {' and '.join(by)} on {rows} training rows" if by else ""
    return (f" to {', '.join(kept)}" if kept else "") + how


def _data(records: Sequence[Mapping[str, Any]]) -> list[str]:
    return [str(record["data"]["name"]) for record in records if record.get("data")]


def _parameters(run: RunFiles, teachers: Sequence[str], keys: Sequence[Mapping[str, Any]]) -> str:
    """Parameters of teacher and student, and their ratio."""
    rows = run.comparison["rows"] if run.comparison is not None else []
    counts = {row["role"]: row["parameters"] for row in rows}
    student = counts.get("student") or parameters_of(str(run.student_folder))
    if student is None and keys and keys[-1].get("student_init", "pretrained") == "pretrained":
        # While it trains, the student is as large as what it started from.
        student = parameters_of(str(keys[-1].get("student") or ""), keys[-1].get("model_revision"))
    revisions = {str(own["teacher"]): own.get("teacher_revision") for own in keys if own.get("teacher")}
    theirs = [student if name == SELF else parameters_of(name, revisions.get(name)) for name in teachers]
    known = [count for count in theirs if count is not None]
    teacher = counts.get("teacher") or (sum(known) if known and len(known) == len(theirs) else None)
    ours = "student's size not known here" if student is None else f"student {readable_count(student)}"
    if not teachers:
        return ours
    if teacher is None:
        return f"{ours}; the teacher's weights are not on this machine"
    if list(teachers) == [SELF]:
        return f"{ours}, its own teacher"
    if student is None:
        return f"teacher {readable_count(teacher)}; {ours}"
    ratio = f"{teacher / student:.1f} times smaller" if student < teacher else "no smaller than its teacher"
    return f"teacher {readable_count(teacher)} → {ours}, {ratio}"


def _cost(run: RunFiles) -> str:
    """Tokens, time and machine of the trainings."""
    parts = run.own_parts
    tokens, steps = tokens_of(parts), sum(part.steps for part in parts)
    seconds = [part.seconds for part in parts if part.seconds is not None]
    words = [f"{tokens:,} supervised tokens" if tokens is not None else f"{steps:,} steps"] if parts else []
    if seconds:
        words.append(f"{readable_time(sum(seconds))} of training")
    if run.comparison is not None and words:
        words[0] = f"{words[0]} in each training"
    machine = run.record.get("machine") or (run.comparison or {}).get("machine")
    if machine:
        words.append(machine_name(machine))
    return ", ".join(words)


def machine_name(machine: Mapping[str, Any]) -> str:
    """The devices that computed."""
    if machine.get("device", "cpu") != "cpu":
        count = machine.get("devices", 1)
        return f"{count} × {machine['device']}" if count > 1 else str(machine["device"])
    threads = machine.get("threads")
    name = machine.get("processor") or "CPU"
    return f"{name}, {threads} thread{'' if threads == 1 else 's'}" if threads else str(name)
