"""Results of one model on disk: a file of numbers, and a file of samples per task, written after each task."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.utils import WeakFileLock

from mmkd.errors import UserError
from mmkd.files import write_file

from .model import EvalModel

SCHEMA = 1
"""The version of the format of results.json, which eval/README.md documents."""

NAME = "results.json"


class Results:
    """Task results and measurements of a model, by a key over everything that decides them.

    `before` is a folder with older results, which are read, but not changed, while `folder` has none. Raises UserError
    if the folder holds results of other weights.
    """

    def __init__(self, folder: Path, model: str, weights: str, before: Path | None = None) -> None:
        self.folder, self.model, self.weights, self.before = folder, model, weights, before
        self._read()

    @classmethod
    def of(cls, model: EvalModel, output: Path | None = None) -> "Results":
        """The results of a model, in the given folder or in the model's own."""
        if output is not None:
            return cls(output, model.name, model.weights)
        return cls(model.results_folder, model.name, model.weights, model.results_before)

    @property
    def path(self) -> Path:
        return self.folder / NAME

    def task(self, key: str) -> dict[str, Any] | None:
        """The entry of a task, or None if it has not run."""
        return self._read()["tasks"].get(key)

    def measure(self, key: str) -> dict[str, Any] | None:
        """The entry of a measurement, or None if it has not been taken."""
        return self._read()["measures"].get(key)

    def add_task(self, key: str, entry: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Stores an entry, with its samples in a file of their own; returns the stored entry."""
        name = f"samples/{entry['task']}-{key[:12]}.jsonl"
        write_file(self.folder / name, "".join(f"{to_json(sample)}\n" for sample in samples))
        return self._add("tasks", key, {**entry, "samples": name})

    def add_measure(self, key: str, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Stores a measurement; returns the stored entry."""
        return self._add("measures", key, entry)

    def _add(self, kind: str, key: str, entry: Mapping[str, Any]) -> dict[str, Any]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(self.folder / ".results.lock"):
            content = self._read()
            content[kind][key] = json.loads(to_json(entry))
            write_file(self.path, to_json(content, indent=1) + "\n")
        return content[kind][key]

    def _read(self) -> dict[str, Any]:
        if not self.path.is_file():
            return self._read_before()
        content = json.loads(self.path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise UserError(
                f"{self.path} has schema {content['schema']}, this mmkd reads {SCHEMA}; use another folder."
            )
        if content["weights"] != self.weights:
            raise UserError(
                f"{self.path} is of another revision of {content['model']}: weights {content['weights'][:12]}, while "
                f"{self.model} now has {self.weights[:12]}. Name another --output, or delete the folder."
            )
        return content

    def _read_before(self) -> dict[str, Any]:
        """The content without a file of its own: older results of the same weights, with absolute paths of samples."""
        content = {"schema": SCHEMA, "model": self.model, "weights": self.weights, "tasks": {}, "measures": {}}
        earlier = {} if self.before is None else json.loads((self.before / NAME).read_text(encoding="utf-8"))
        if self.before is None or any(earlier[key] != content[key] for key in ("schema", "weights")):
            return content
        for key, entry in earlier["tasks"].items():
            content["tasks"][key] = {**entry, "samples": str((self.before / entry["samples"]).resolve())}
        return {**content, "measures": earlier["measures"]}


def key_of(*parts: Any) -> str:
    """sha256 (hex) of everything that decides a result."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def to_json(value: Any, **options: Any) -> str:
    """JSON text; numbers of numpy are allowed."""
    return json.dumps(value, ensure_ascii=False, default=_plain, **options)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)
