"""The student that is exported: its model, its rows, and what its training says of it."""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from datasets import Dataset
from huggingface_hub import snapshot_download
from transformers import AutoConfig

from mmkd.data.image_columns import image_column
from mmkd.data.load_data import load_data
from mmkd.errors import UserError
from mmkd.eval.exported_check import student_views
from mmkd.eval.measures import HeldOut
from mmkd.eval.model import find_model
from mmkd.export.formats import FORMATS
from mmkd.export.vllm_runtime import VLLM
from mmkd.models.adapters import merge_adapter
from mmkd.models.load import empty_model
from mmkd.models.quantised_students import StudentQuantisation
from mmkd.teachers.batch import View
from mmkd.training.method import METHODS

from .runs import record_of


@dataclass(frozen=True)
class ExportOptions:
    """How a student is exported and checked."""

    output: Path | None = None
    """Folder of the only format; by default one for each in the folder of the run."""
    data: str | None = None
    """Whose rows it is calibrated on and checked on; by default those of the run."""
    rows: int = 32
    """Held-out rows of the check; 0 checks nothing."""
    calibration_rows: int = 128
    max_length: int = 512
    group: int | None = None
    """Weights that share a scale in int4."""
    skip: Sequence[str] = ()
    llama_cpp: str | None = None
    llm_compressor: str | None = None
    vllm: str | None = None
    """The Python that has vLLM; by default that of scripts/serve_teacher.sh, and none where there is none."""
    device: str = "cpu"
    trust_remote_code: bool = False


class StudentToExport:
    """The student of a run: its model, its rows, and what its training says of it."""

    def __init__(self, name: str, options: ExportOptions) -> None:
        self.eval_model = find_model(name, trust_remote_code=options.trust_remote_code)
        self.record = record_of(Path(name)) if Path(name).is_dir() else {}
        self.keys: Mapping[str, Any] = self.record.get("keys", {})
        self.options = options
        method = str(self.record.get("method", ""))
        if method in METHODS and METHODS[method].predicts != "tokens":
            raise UserError(
                f"{name} predicts {METHODS[method].predicts}, and what is exported are models of language. "
                "transformers and sentence-transformers have exports to ONNX of their own.",
                because="not built",
            )
        self.processing_class = self.eval_model.processing_class
        self._open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        # A merged student is for the time of the export only.
        self._open.close()

    def quantisation(self, format: str) -> StudentQuantisation:
        """How its weights are rounded to a format: as in its training, but for what the user says otherwise."""
        given = {"group": self.options.group if format == "int4" else None, "skip": self.options.skip or None}
        trained = self.eval_model.quantisation
        if trained is not None and trained.format == format:
            return replace(trained, **{name: value for name, value in given.items() if value})
        return StudentQuantisation.of(format, **given)

    @cached_property
    def vllm(self) -> VLLM | None:
        """vLLM, where it is at hand. Raises UserError for a named one that is none."""
        return VLLM.find(self.options.vllm)

    @property
    def vocab_size(self) -> int:
        return self.config.get_text_config().vocab_size

    @cached_property
    def empty_model(self) -> Any:
        """The student's modules without weights."""
        return empty_model(self.eval_model.path, "student", **self.eval_model.hub)

    @property
    def data(self) -> str | None:
        return self.options.data or (str(self.keys["data"]) if self.keys.get("data") else None)

    @cached_property
    def config(self) -> Any:
        return AutoConfig.from_pretrained(self.eval_model.path, **self.eval_model.hub)

    @cached_property
    def model(self) -> Any:
        """The student as it is evaluated, in float32 on a CPU."""
        return self.eval_model.load("float32" if self.options.device == "cpu" else "auto", self.options.device)

    @cached_property
    def folder(self) -> str:
        """A folder with the whole student: adapters are merged into their model."""
        if self.eval_model.adapter:
            scratch = Path(self._open.enter_context(tempfile.TemporaryDirectory()), "student")
            merge_adapter(Path(self.eval_model.adapter), scratch, self.options.trust_remote_code)
            return str(scratch)
        place = self.eval_model.path
        return place if Path(place).is_dir() else snapshot_download(place, revision=self.eval_model.revision)

    @cached_property
    def held_out(self) -> Dataset | None:
        """The rows that an export is checked on; None without data."""
        if self.data is None or not self.options.rows:
            return None
        return HeldOut(self.data, self.options.rows).load()

    @cached_property
    def views(self) -> list[Any]:
        """The same as the student reads them; none without data."""
        if self.held_out is None:
            return []
        served = self.vllm is not None
        return list(student_views(self.model, self.processing_class, self.held_out, self.options.max_length, served))

    @cached_property
    def calibration(self) -> list[View]:
        """Training rows as the student reads them. Raises UserError where there is no data."""
        if self.data is None:
            raise UserError("This format is calibrated on rows of text, and no run says which: name them with --data.")
        rows = image_column(load_data(self.data, max_train_rows=self.options.calibration_rows)["train"])
        return list(student_views(self.model, self.processing_class, rows, self.options.max_length))

    @property
    def calibration_ids(self) -> list[list[int]]:
        """The tokens of the same rows."""
        return [view.inputs["input_ids"][0].tolist() for view in self.calibration]


def trained_quantization(name: str, formats: Sequence[str]) -> list[str]:
    """The quantisation that a run's student was trained with, where all formats have it; else none."""
    trained = record_of(Path(name)).get("keys", {}).get("student_quantization") if Path(name).is_dir() else None
    asked = [FORMATS[word] for word in formats if word in FORMATS]
    return [trained] if trained and asked and all(trained in each.quantizations for each in asked) else []
