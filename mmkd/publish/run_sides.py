"""Student and teacher of a run as models that answer: which they are, how large, and whether they fit here."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmkd.errors import UserError
from mmkd.eval.exported_lm import exported_model
from mmkd.eval.model import EvalModel, find_model
from mmkd.export.exported import Exported, find_exported
from mmkd.export.exported_answers import ExportedGenerator
from mmkd.generation.generator import Generator
from mmkd.generation.row_answers import PromptWithTools, row_generator, served_row_generator
from mmkd.models.load import load_model, quantised_to, tokenizer_of
from mmkd.preflight.costs import device_memory
from mmkd.results.own_teacher import with_teacher_named
from mmkd.results.parameters import parameters_of
from mmkd.teachers.vllm_client import VLLMClient
from mmkd.training.method import METHODS

from .runs import RunFiles

STUDENT, TEACHER = "student", "teacher"

_BYTES = {"cpu": 4, "cuda": 2}
"""Per parameter: a CPU may have to compute in float32."""
_ROOM = 0.5
"""The share of a device's memory that a model may take here."""


@dataclass(frozen=True)
class TeacherServer:
    """Where a served teacher answers."""

    urls: tuple[str, ...]
    model: str | None
    """The served name, where the servers offer several."""
    teacher: str | None
    """The folder or Hub id that must be served; None if the run names none."""
    timeout: float

    def generator(self, processing_class: Any) -> Generator[PromptWithTools]:
        """Asks the servers. Raises UserError where one is down, or serves another model or tokenizer."""
        client = VLLMClient(self.urls, self.model, timeout=self.timeout, retries=1)
        client.check(self.teacher, tokenizer=tokenizer_of(processing_class))
        return served_row_generator(client, processing_class)


@dataclass(frozen=True)
class RunSide:
    """One of the models of a run."""

    name: str
    """student, teacher, or `teacher NAME` of several."""
    model: EvalModel
    """Of a teacher that the run names by its server alone: the student, whose tokenizer it has."""
    parameters: int | None
    dtype: str = "auto"
    bits: int | None = None
    """4 or 8 where it is quantised as in training."""
    server: TeacherServer | None = None
    """Answers in the model's place."""
    exported: Exported | None = None
    """What another runtime than transformers reads, in the model's place."""

    @property
    def title(self) -> str:
        """The model as the user named it, or where it is served."""
        return self.model.name if self.server is None else ", ".join(self.server.urls)

    @property
    def size(self) -> float:
        """Bytes that it takes on this machine's device; 0 if that is not known, and of a served model."""
        if self.parameters is None or self.server is not None:
            return 0
        return self.parameters * (_BYTES[device_here()] if self.bits is None else self.bits / 8)

    @property
    def fits(self) -> bool:
        """Whether half of the device's memory holds it. A model of unknown size is taken to fit."""
        return self.fits_beside(0)

    def fits_beside(self, size: float) -> bool:
        """Whether it fits beside models of so many bytes together."""
        return self.size == 0 or self.size + size <= _ROOM * device_memory()[1]

    def generator(self) -> Generator[PromptWithTools]:
        """Answers prompts: the model, loaded onto this machine's device, or its servers."""
        if self.server is not None:
            return self.server.generator(self.model.processing_class)
        if self.exported is not None:
            return ExportedGenerator.of(self.exported, self.model.processing_class)
        return row_generator(self._load(), self.model.processing_class)

    def _load(self) -> Any:
        device = device_here()
        if self.bits is None:
            return self.model.load(self.dtype, device)
        quantised = quantised_to(self.bits, device)
        hub = self.model.hub
        return load_model(
            self.model.path, self.name, device=device, dtype=self.dtype, quantization_config=quantised, **hub
        )


def device_here() -> str:
    """The device that models answer on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def sides_of(run: RunFiles, trust_remote_code: bool = False) -> dict[str, RunSide]:
    """The student of a run and its teachers that are models or served, the student first.

    Code that comes with a model runs only if the caller trusts it: a run's record may come from somebody else.

    Raises UserError for a run that has no student on disk yet, and one that predicts something else than tokens.
    """
    method = str(run.record.get("method", ""))
    if method in METHODS and METHODS[method].predicts != "tokens":
        raise UserError(f"{run.folder} predicts {METHODS[method].predicts} and no tokens: it writes no text.")
    student = find_model(str(run.student_folder), trust_remote_code=trust_remote_code)
    sides = {STUDENT: RunSide(STUDENT, student, parameters_of(student.adapter or student.path))}
    for name, keys in _teachers(run).items():
        if keys.get("teacher") or keys.get("teacher_server"):
            sides[name] = _teacher(name, keys, student)
    return sides


def exported_side(name: str, wanted: str, trust_remote_code: bool = False) -> RunSide:
    """An exported student of a run or a model, named as `find_exported` takes it."""
    exported = find_exported(name, wanted)
    model = exported_model(exported.name, exported, find_model(name, trust_remote_code=trust_remote_code))
    return RunSide(exported.name, model, None, exported=model.exported)


def silent_teachers(run: RunFiles) -> str:
    """Which teachers of a run cannot answer, and why, as a sentence; empty if there are none."""
    caches = {name: keys["teacher_cache"] for name, keys in _teachers(run).items() if _is_only_cached(keys)}
    return "".join(
        f"The {name} cannot answer: the run read it from the cache {cache} and names no model. "
        for name, cache in caches.items()
    ).strip()


def _is_only_cached(keys: Mapping[str, Any]) -> bool:
    return bool(keys.get("teacher_cache")) and not (keys.get("teacher") or keys.get("teacher_server"))


def _teacher(name: str, keys: Mapping[str, Any], student: EvalModel) -> RunSide:
    named = keys.get("teacher")
    model = find_model(str(named), keys.get("teacher_revision"), student.trust_remote_code) if named else student
    if urls := keys.get("teacher_server"):
        urls = [urls] if isinstance(urls, str) else urls
        timeout = float(keys.get("teacher_timeout") or 600)
        server = TeacherServer(tuple(urls), keys.get("teacher_server_model"), named, timeout)
        return RunSide(name, model, None, server=server)
    bits = 4 if keys.get("teacher_load_in_4bit") else 8 if keys.get("teacher_load_in_8bit") else None
    dtype = str(keys.get("teacher_dtype") or "auto")
    return RunSide(name, model, parameters_of(model.path, model.revision), dtype, bits)


def _teachers(run: RunFiles) -> dict[str, Mapping[str, Any]]:
    """The keys of each teacher of the last training that has one."""
    records = [record["keys"] for record in [*run.stages.values(), run.record] if "keys" in record]
    for keys in reversed(records):
        several = keys.get("teachers")
        if isinstance(several, Mapping):
            return {f"{TEACHER} {name}": with_teacher_named({**keys, **own}) for name, own in several.items()}
        if any(keys.get(source) for source in ("teacher", "teacher_server", "teacher_cache")):
            return {TEACHER: with_teacher_named(keys)}
    return {}


def is_at_hand(side: RunSide) -> bool:
    """Whether it is served, or its weights are on this machine."""
    model = side.model
    return (
        side.server is not None or Path(model.path).is_dir() or parameters_of(model.path, model.revision) is not None
    )
