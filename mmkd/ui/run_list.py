"""The runs under a folder and how each of them stands."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmkd.errors import UserError
from mmkd.publish.runs import LOG, RunFiles, is_run, read_run
from mmkd.results.places import COMPARISON, RECORD

DEPTH = 5
"""How many folders deep runs are looked for."""

SILENT = 600
"""Seconds without a new line in the log after which an unfinished run counts as stopped."""

_SHOWN = ("loss", "kl", "top1_agreement", "supervised_tokens_per_second", "eta_minutes")


class UnknownRun(UserError):
    """A run or a model of one is asked for that is not there."""


class RunList:
    """The runs under a folder. Each is read again only when one of its files has changed."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._read: dict[Path, tuple[Any, RunFiles]] = {}

    def folders(self) -> dict[str, Path]:
        """The runs' folders by their paths under the root; the root itself is `.`."""
        return {path.relative_to(self.root).as_posix(): path for path in _runs_in(self.root, DEPTH)}

    def folder(self, name: str) -> Path:
        """The folder of a run by its path under the root. Raises UnknownRun for any other path."""
        folders = self.folders()
        if name not in folders:
            raise UnknownRun(f"There is no run {name!r} in {self.root}.")
        return folders[name]

    def run(self, name: str) -> RunFiles:
        """The files of a run by its path under the root. Raises UnknownRun for any other path."""
        return self._files_of(self.folder(name))

    def rows(self) -> list[dict[str, Any]]:
        """What the list shows of each run, the newest first."""
        rows = [_row(name, self._files_of(folder)) for name, folder in self.folders().items()]
        return sorted(rows, key=lambda row: row["changed"], reverse=True)

    def _files_of(self, folder: Path) -> RunFiles:
        state = _signature(folder)
        if folder not in self._read or self._read[folder][0] != state:
            self._read[folder] = (state, read_run(folder))
        return self._read[folder][1]


def _runs_in(folder: Path, depth: int) -> Iterator[Path]:
    """Runs in a folder. Those inside another run belong to it, those of a comparison are runs too."""
    if is_run(folder):
        yield folder
        if not (folder / COMPARISON).is_file():
            return
    if depth:
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.is_symlink() and not path.name.startswith((".", "checkpoint-")):
                yield from _runs_in(path, depth - 1)


def _signature(folder: Path) -> list[tuple[str, int, int]]:
    """What changes when a run goes on."""
    names = (LOG, RECORD, COMPARISON, "report.json", "results.json", "trainer_state.json", "samples.jsonl")
    files = [path for name in names for path in folder.rglob(name)]
    stats = [(str(path), path.stat()) for path in files]
    return [(path, stat.st_mtime_ns, stat.st_size) for path, stat in stats]


def _row(name: str, run: RunFiles) -> dict[str, Any]:
    parts = [part for part in run.own_parts if part.log]
    last = parts[-1] if parts else None
    logs = [part.folder / LOG for part in parts if (part.folder / LOG).is_file()]
    changed = max((path.stat().st_mtime for path in logs), default=run.folder.stat().st_mtime)
    records = list(run.stages.values()) or [run.record]
    methods = [str(record.get("method", "")) for record in records]
    data = [str((record.get("data") or {}).get("name") or "") for record in records]
    return {
        "name": name,
        "title": run.name if name == "." else name,
        "kind": "comparison" if run.comparison is not None and (run.folder / COMPARISON).is_file() else "run",
        "method": ", ".join(dict.fromkeys(filter(None, methods))),
        "data": ", ".join(dict.fromkeys(filter(None, data))),
        "state": _state(run, changed),
        "part": last.name if last is not None and len(parts) > 1 else "",
        "step": 0 if last is None else last.steps,
        "planned": None if last is None else last.planned,
        "changed": changed,
        **_latest(last.log if last is not None else []),
    }


def _state(run: RunFiles, changed: float) -> str:
    if run.finished or (run.folder / COMPARISON).is_file():
        return "finished"
    return "running" if time.time() - changed < SILENT else "stopped"


def _latest(log: list[dict[str, Any]]) -> Mapping[str, Any]:
    """The last logged values of what the list shows."""
    return {name: next((entry[name] for entry in reversed(log) if name in entry), None) for name in _SHOWN}
