"""The files of a run, finished or not, that a report needs. Imports neither torch nor transformers."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mmkd.errors import UserError
from mmkd.results.own_teacher import SELF
from mmkd.results.places import COMPARISON, RECORD, RESULTS, results_before, results_folder

LOG, STATE = "log.jsonl", "trainer_state.json"
ROUNDS, CHOICE = "round-*/report.json", "interpolation.json"

BEFORE_RESULTS, TEACHER_RESULTS = "student before", "teacher"
"""Names of the results of the model that a student started from, and of its teacher."""

Log = list[dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """One training: a run, a stage of it, or a round."""

    name: str
    folder: Path
    log: Log

    @cached_property
    def record(self) -> dict[str, Any]:
        """What the training recorded of itself."""
        return read_json(self.folder / RECORD)

    @property
    def data(self) -> str:
        """The name of its data; empty if it is not recorded."""
        return str((self.record.get("data") or {}).get("name") or "")

    @property
    def steps(self) -> int:
        """The last step that was logged."""
        return max((int(entry["step"]) for entry in self.log if "step" in entry), default=0)

    @property
    def tokens(self) -> int | None:
        """Supervised tokens over all sessions; None if they are not counted, as for classes."""
        return next(
            (int(entry["supervised_tokens"]) for entry in reversed(self.log) if "supervised_tokens" in entry), None
        )

    @property
    def seconds(self) -> float | None:
        """The time of its steps in seconds, over all sessions; else that of the last session with its evaluations."""
        names = ("training_seconds", "train_runtime")
        return next((entry[name] for name in names for entry in reversed(self.log) if name in entry), None)

    @property
    def planned(self) -> int | None:
        """The planned number of steps, if known."""
        return next((entry["max_steps"] for entry in reversed(self.log) if "max_steps" in entry), None)


@dataclass(frozen=True)
class RunFiles:
    """The contents of a run's folder."""

    folder: Path
    lines: dict[str, list[Part]]
    """Name -> consecutive trainings; several names if the run was compared with others."""
    record: dict[str, Any]
    results: dict[str, dict[str, Any]]
    """Name of a model -> its results.json."""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name of a stage -> its record, for a run in stages."""
    comparison: dict[str, Any] | None = None
    rounds: Log = field(default_factory=list)
    choice: dict[str, Any] | None = None
    assessed: Path | None = None
    """The last round whose answers were compared."""

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.resolve().name

    @property
    def keys(self) -> dict[str, Any]:
        """The keys of the recipe of its last training."""
        return self.record.get("keys", {})

    @property
    def finished(self) -> bool:
        """Whether its own trainings are at their end."""
        parts = [part for part in self.own_parts if part.log]
        return bool(parts) and self._is_done(parts[-1])

    @property
    def student_folder(self) -> Path:
        """The folder of the student: the run's own, or that of its last training."""
        parts = self.own_parts
        own = [self.folder, *(part.folder for part in parts[-1:])]
        return next((place for place in own if any(place.glob("*.safetensors"))), own[-1])

    @property
    def own_parts(self) -> list[Part]:
        """The trainings of the run itself; of a comparison's folder, those of its first student."""
        lines = {name: parts for name, parts in self.lines.items() if any(part.log for part in parts)}
        folder = self.folder.resolve()
        inside = [
            parts for parts in lines.values() if all(part.folder.resolve().is_relative_to(folder) for part in parts)
        ]
        if self.comparison is not None:
            names = [row["name"] for row in shown_rows(self.comparison, self.folder)]
            inside = [lines[name] for name in names if name in lines] or inside
        return inside[0] if inside else []

    @property
    def state(self) -> str:
        """The progress of the run, as a sentence."""
        if (self.folder / COMPARISON).is_file():
            return "Every training of the comparison is finished."
        folder = self.folder.resolve()
        lines = self.lines.values()
        inside = [line for line in lines if any(part.folder.resolve().is_relative_to(folder) for part in line)]
        own = inside[-1] if inside else []
        if not any(part.log for part in own):
            return "Nothing is logged."
        last = [part for part in own if part.log][-1]
        of = f" of {last.planned:,}" if last.planned else ""
        part = f"{last.name}, " if last.name != self.folder.name else ""
        done = self._is_done(last)
        return f"{part}step {last.steps:,}{of}: {'finished' if done else 'not finished, or still running'}."

    def _is_done(self, last: Part) -> bool:
        places = [place for place in (last.folder, *last.folder.parents) if place.is_relative_to(self.folder)]
        records = [record for place in places or [last.folder] if (record := read_json(place / RECORD))]
        # A finished round does not mean that its loop is finished: all records count.
        return all(record["finished"] for record in records) if records else last.steps == last.planned


def read_run(folder: Path, comparison: Path | None = None) -> RunFiles:
    """The files that a run, a run in stages or rounds, or a comparison has written so far.

    `comparison` is a folder or file of `mmkd compare`; by default the run's own, or one beside it that names it.
    Raises UserError for a folder that holds nothing of the kind.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of a run. Name the output_dir of a training, or of `mmkd compare`.")
    compared = comparison_of(folder, comparison)
    parts = parts_of(folder)
    lines = {} if compared is None else _compared(compared, folder)
    if any(part.log for part in parts):
        compared_folders = {part.folder.resolve() for line in lines.values() for part in line}
        if not {part.folder.resolve() for part in parts} <= compared_folders:
            lines = {folder.name: parts, **lines}
    elif compared is None:
        lines = _under_way(folder)
    results = _results(folder, parts, compared)
    record = record_of(folder)
    if not record:
        students = [row["folders"][0] for row in compared["rows"] if row["role"] == "student"] if compared else []
        shown = [Path(name) for name in students] or [folder / name for name in reversed(lines)]
        record = next((record for record in (record_of(path) for path in shown if path.is_dir()) if record), {})
    rounds = [read_json(path) for path in sorted(_deep(folder, ROUNDS), key=lambda path: _number(path.parent))]
    choices = [read_json(path) for path in _deep(folder, CHOICE)]
    logged = any(part.log for line in lines.values() for part in line)
    if not any((logged, results, compared, record, rounds, choices)):
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise UserError(
            f"{folder} holds nothing to report: no {LOG}, {STATE}, {RESULTS} or {COMPARISON}, but {held}. Name the "
            "output_dir of a training."
        )
    assessed = sorted((path.parent for path in _deep(folder, "round-*/scores.jsonl")), key=_number)
    return RunFiles(
        folder,
        lines,
        record,
        results,
        {path.name: own for path in stages_of(folder) if (own := record_of(path))},
        compared,
        rounds,
        choices[-1] if choices else None,
        assessed[-1] if assessed else None,
    )


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run or a comparison, finished or not. A checkpoint is none."""
    if folder.name.startswith("checkpoint-"):
        return False
    names = (RECORD, LOG, STATE, COMPARISON)
    return any((folder / name).is_file() for name in names) or any(map(is_run, stages_of(folder)))


def parts_of(folder: Path, prefix: str = "") -> list[Part]:
    """The trainings of a run, in order."""
    stages = stages_of(folder)
    if stages:
        several = len(stages) > 1
        return [part for stage in stages for part in parts_of(stage, f"{stage.name} " if several else "")]
    rounds = [path for path in folder.glob("round-*") if path.is_dir()]
    if rounds:
        trained = [(path, inner) for path in sorted(rounds, key=_number) for inner in _trained(path)]
        return [Part(f"{prefix}{path.name}", inner, read_log(inner)) for path, inner in trained]
    return [Part(prefix.strip() or folder.name, folder, read_log(folder))]


def tokens_of(parts: Sequence[Part]) -> int | None:
    """The sum of supervised tokens of trainings; None if none of them counts tokens."""
    counted = [part.tokens for part in parts if part.tokens is not None]
    return sum(counted) if counted else None


def stages_of(folder: Path) -> list[Path]:
    """The folders of a run's stages, in order."""
    stages = [path for path in folder.iterdir() if path.is_dir() and re.fullmatch(r"\d+-\w+", path.name)]
    return sorted(stages, key=_number)


def read_log(folder: Path) -> Log:
    """The log of a training: from its log file, or else from its newest trainer state."""
    path = folder / LOG
    if path.is_file():
        return read_lines(path)
    states = [*sorted(folder.glob(f"checkpoint-*/{STATE}"), key=lambda path: _number(path.parent)), folder / STATE]
    for path in reversed([path for path in states if path.is_file()]):
        state = read_json(path)
        if state:
            return [{**entry, "max_steps": state.get("max_steps")} for entry in state["log_history"]]
    return []


def read_lines(path: Path) -> Log:
    """The objects of a JSON Lines file, without an incomplete last line."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if the file is missing or incomplete."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return {}


def record_of(folder: Path) -> dict[str, Any]:
    """The record of the run, or else of its last stage or part."""
    places = [folder, *reversed(stages_of(folder)), *(part.folder for part in reversed(parts_of(folder)))]
    return next((record for place in places if (record := read_json(place / RECORD))), {})


def with_parts(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A data recipe's facts and those of all its parts."""
    return [data, *(nested for part in data.get("parts", []) for nested in with_parts(part))]


def _trained(round_folder: Path) -> list[Path]:
    """The folder of the training in a round; with LoRA it is not the folder of the merged student."""
    inner = [path for path in round_folder.iterdir() if path.is_dir() and read_log(path)]
    return inner[:1]


def _deep(folder: Path, pattern: str) -> list[Path]:
    """Matches in a run's folder, or else in the folders of its stages."""
    return sorted(folder.glob(pattern)) or sorted(folder.glob(f"[0-9]*-*/{pattern}"))


def comparison_of(folder: Path, chosen: Path | None) -> dict[str, Any] | None:
    """The comparison at a path; by default the run's own, or one beside it that names the run; or None."""
    if chosen is not None:
        path = chosen / COMPARISON if chosen.is_dir() else chosen
        content = read_json(path)
        if not content:
            raise UserError(f"{path} is no comparison. Name the --output of `mmkd compare`.")
        return content
    if (folder / COMPARISON).is_file():
        return read_json(folder / COMPARISON)
    beside = read_json(folder.parent / COMPARISON)
    named = {Path(name).resolve() for row in beside.get("rows", []) for name in row["folders"]}
    return beside if folder.resolve() in named else None


def shown_rows(comparison: Mapping[str, Any], folder: Path) -> list[Mapping[str, Any]]:
    """The models of a comparison that a report is about: the one in the folder, or else all students."""
    trained = [row for row in comparison["rows"] if row["cost"]]
    own = [row for row in trained if folder.resolve() in {Path(name).resolve() for name in row["folders"]}]
    return own or [row for row in trained if row["role"] == "student"]


def _seed_of(row: Mapping[str, Any], folder: Path) -> str:
    """The folder that represents a row of a comparison: the run's own, or else that of the first seed."""
    own = (name for name in row["folders"] if Path(name).resolve() == folder.resolve())
    return next(own, row["folders"][0])


def _compared(comparison: Mapping[str, Any], folder: Path) -> dict[str, list[Part]]:
    """The trainings of a comparison, with one seed per row."""
    trained = {row["name"]: Path(_seed_of(row, folder)) for row in comparison["rows"] if row["cost"]}
    return {name: parts_of(path) for name, path in trained.items() if path.is_dir()}


def _under_way(folder: Path) -> dict[str, list[Part]]:
    """The trainings that an unfinished comparison has begun, in order, by their records."""
    records = {path: read_json(path / RECORD) for path in folder.iterdir() if (path / RECORD).is_file()}
    return {path.name: parts_of(path) for path in sorted(records, key=lambda path: records[path]["started"])}


def _results(folder: Path, parts: list[Part], comparison: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Results of the run itself, or of all models of a comparison."""
    if comparison is not None:
        places = {row["name"]: _kept(_seed_of(row, folder)) for row in comparison["rows"]}
    else:
        last = parts[-1].folder if parts else folder
        own = folder if (folder / RESULTS).is_file() else last
        places = {folder.name: own / "eval"}
        keys = record_of(folder).get("keys", {})
        if keys.get("student") and keys.get("student_init", "pretrained") == "pretrained":
            places = {BEFORE_RESULTS: _kept(str(keys["student"])), **places}
        if keys.get("teacher", SELF) != SELF:
            places = {TEACHER_RESULTS: _kept(str(keys["teacher"])), **places}
    contents = {name: (place, read_json(place / "results.json")) for name, place in places.items()}
    return {name: {**content, "folder": str(place)} for name, (place, content) in contents.items() if content}


def _kept(model: str) -> Path:
    """The folder with a model's results; that of an earlier version of mmkd if there are no newer results."""
    folder = results_folder(model)
    return folder if (folder / Path(RESULTS).name).is_file() else results_before(model) or folder


def _number(path: Path) -> int:
    match = re.search(r"\d+", path.name)
    assert match is not None
    return int(match[0])
