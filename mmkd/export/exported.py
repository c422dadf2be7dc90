"""An exported student on disk: its files, what made them, and how far it is from the student."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.cache.identity import file_sha256
from mmkd.errors import UserError
from mmkd.files import write_file

from .formats import FORMATS, ExportSpec

RECORD, FOLDER = "exported.json", "exported"
"""The file that describes an exported student, and the folder in that of a run that holds all of them."""

WEIGHTS = (".safetensors", ".gguf", ".onnx", ".data")
"""How the names of files with weights end."""

SCHEMA = 1


@dataclass(frozen=True)
class Exported:
    """A folder with a student in a format of another runtime."""

    folder: Path
    record: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Exported":
        """Raises UserError for a folder without a record, and for one of a later mmkd."""
        path = folder / RECORD
        if not path.is_file():
            raise UserError(f"{folder} has no {RECORD}: it is no exported student. `mmkd export` writes them.")
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["schema"] != SCHEMA:
            raise UserError(f"{path} has schema {record['schema']}, and this mmkd reads {SCHEMA}. Export again.")
        return cls(folder, record)

    @property
    def spec(self) -> ExportSpec:
        return ExportSpec(self.record["format"], self.record["quantization"])

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def path(self) -> Path:
        """What its runtime is given: a file, or the folder of a model."""
        main = self.record.get("main")
        return self.folder / main if main else self.folder

    @property
    def weights(self) -> str:
        """sha256 of its files."""
        listed = self.record.get("files")
        sums = {self.path.name: file_sha256(self.path)} if listed is None else listed
        return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()

    @property
    def remarks(self) -> list[str]:
        """What a user should know of it."""
        return [*self.record.get("notes", []), *self.record.get("warnings", [])]

    def check_files(self) -> None:
        """Raises UserError for a file that is missing or has changed since it was written."""
        for name, facts in self.record["files"].items():
            path = self.folder / name
            if not path.is_file() or file_sha256(path) != facts["sha256"]:
                state = "is missing" if not path.is_file() else "has changed since it was exported"
                raise UserError(f"{path} {state}. Delete {self.folder} and run `mmkd export` again.")

    @property
    def checks(self) -> dict[str, dict[str, Any]]:
        """Name of a runtime -> what it made of the file, and how far that is from the student."""
        return dict(self.record.get("checks", {}))

    @property
    def check(self) -> dict[str, Any]:
        """The first of the checks; empty without any."""
        return next(iter(self.checks.values()), {})

    def with_facts(self, **facts: Any) -> "Exported":
        """The same with these facts in its record, on disk too."""
        record = {**self.record, **facts}
        write_record(self.folder, record)
        return Exported(self.folder, record)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes what describes an exported student."""
    write_file(folder / RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def exported_of(run: Path) -> list[Exported]:
    """The exported students in the folder of a run, by name."""
    places = sorted((run / FOLDER).glob(f"*/{RECORD}"))
    return [Exported.read(place.parent) for place in places]


def find_exported(run: str, wanted: str) -> Exported:
    """The exported student that a user names: a folder, a file in it, or the name of one of the run.

    A GGUF file that mmkd did not write is one too. Raises UserError where there is none.
    """
    place = Path(wanted)
    known = [each.name for each in exported_of(Path(run))] if Path(run).is_dir() else []
    in_run = Path(run) / FOLDER / wanted.replace(":", "-")
    if wanted.replace(":", "-") in known:
        return Exported.read(in_run)
    if place.is_dir():
        return Exported.read(place)
    if place.is_file() and (place.parent / RECORD).is_file():
        return Exported.read(place.parent)
    if place.is_file() and place.suffix == ".gguf":
        return Exported(place.parent, {"format": "gguf", "quantization": place.stem, "main": place.name})
    short = [name for name in known if name.startswith(f"{wanted}-")]
    if len(short) == 1:
        return Exported.read(Path(run) / FOLDER / short[0])
    listed = (
        f"{run} has {', '.join(known)}" if known else f"{run} has none: `mmkd export {run} --format ...` makes some"
    )
    many = " Say which one." if len(short) > 1 else ""
    formats = f" Formats are {', '.join(FORMATS)}." if not known else ""
    raise UserError(f"There is no exported student {wanted!r}; {listed}.{many}{formats}")
