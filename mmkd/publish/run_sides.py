"""Student and teacher of a run as models that answer here: which they are, how large, and whether they fit."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmkd.errors import UserError
from mmkd.eval.model import EvalModel, find_model
from mmkd.preflight.costs import device_memory
from mmkd.results.parameters import parameters_of
from mmkd.training.method import METHODS

from .runs import RunFiles

STUDENT, TEACHER = "student", "teacher"

_BYTES = {"cpu": 4, "cuda": 2}
"""Per parameter: a CPU may have to compute in float32."""
_ROOM = 0.5
"""The share of a device's memory that a model may take here."""


@dataclass(frozen=True)
class RunSide:
    """One of the models of a run."""

    name: str
    """student, teacher, or `teacher NAME` of several."""
    model: EvalModel
    parameters: int | None
    dtype: str = "auto"

    @property
    def fits(self) -> bool:
        """Whether half of the device's memory holds it. A model of unknown size is taken to fit."""
        return self.fits_beside(0)

    def fits_beside(self, parameters: int) -> bool:
        """Whether it fits beside models with so many parameters together."""
        if self.parameters is None:
            return True
        return (self.parameters + parameters) * _BYTES[device_here()] <= _ROOM * device_memory()[1]

    def load(self) -> Any:
        """The model on this machine's device."""
        return self.model.load(self.dtype, device_here())


def device_here() -> str:
    """The device that models answer on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def sides_of(run: RunFiles) -> dict[str, RunSide]:
    """The student of a run and its teachers that are models, the student first.

    Raises UserError for a run that has no student on disk yet, and one that predicts something else than tokens.
    """
    method = str(run.record.get("method", ""))
    if method in METHODS and METHODS[method].predicts != "tokens":
        raise UserError(f"{run.folder} predicts {METHODS[method].predicts} and no tokens: it writes no text.")
    student = find_model(str(run.student_folder), trust_remote_code=bool(run.keys.get("trust_remote_code")))
    sides = {STUDENT: RunSide(STUDENT, student, parameters_of(student.adapter or student.path))}
    for name, keys in _teachers(run).items():
        model = find_model(str(keys["teacher"]), keys.get("teacher_revision"), bool(keys.get("trust_remote_code")))
        dtype = str(keys.get("teacher_dtype") or "auto")
        sides[name] = RunSide(name, model, parameters_of(model.path, model.revision), dtype)
    return sides


def _teachers(run: RunFiles) -> dict[str, Mapping[str, Any]]:
    """The keys of each teacher of the last training that has one."""
    records = [record["keys"] for record in [*run.stages.values(), run.record] if "keys" in record]
    for keys in reversed(records):
        several = keys.get("teachers")
        if isinstance(several, Mapping):
            named = {f"{TEACHER} {name}": {**keys, **own} for name, own in several.items() if own.get("teacher")}
            return dict(named)
        if keys.get("teacher"):
            return {TEACHER: keys}
    return {}


def is_local(model: EvalModel) -> bool:
    """Whether a model's weights are on this machine."""
    return Path(model.path).is_dir() or parameters_of(model.path, model.revision) is not None
