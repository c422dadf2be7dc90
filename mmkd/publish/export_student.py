"""`mmkd export`: the student of a run in formats of other runtimes, each checked by a runtime that reads it."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmkd import __version__
from mmkd.cache.identity import file_sha256
from mmkd.errors import UserError
from mmkd.eval.exported_check import difference
from mmkd.export.exported import FOLDER, RECORD, SCHEMA, WEIGHTS, Exported, write_record
from mmkd.export.formats import ExportSpec
from mmkd.export.gguf_writer import TOWER
from mmkd.export.llama_runtime import has_llama_cpp
from mmkd.export.loading import runtime_of
from mmkd.export.runtimes import Runtime, has_images
from mmkd.export.transformers_runtime import TransformersRuntime
from mmkd.export.vllm_runtime import VLLMRuntime
from mmkd.files import new_folder
from mmkd.models.load import load_processing_class, tokenizer_of
from mmkd.results.machine import machine
from mmkd.results.places import results_folder

from .export_writers import Writer, writer_of
from .student_to_export import ExportOptions, StudentToExport

Say = Callable[[str], None]


def export(name: str, specs: Sequence[ExportSpec], options: ExportOptions, say: Say) -> list[Exported]:
    """Writes and checks a student in each of the formats; what is there already is not written again.

    Raises UserError for what cannot be exported or read, of all formats before the first is written.
    """
    if options.output is not None and len(specs) > 1:
        raise UserError("--output is the folder of one format; leave it out to export several.", because="meaning")
    with StudentToExport(name, options) as student:
        places = {spec: options.output or place_of(spec, student) for spec in specs}
        for folder in places.values():
            _check_place(folder)
        # Rows and programs that cannot be had are said before anything is written.
        _ = student.held_out, student.vllm
        writers = {spec: writer_of(spec, student) for spec in specs}
        return [_exported(spec, places[spec], student, writer, say) for spec, writer in writers.items()]


def check_again(name: str, exported: Sequence[Exported], options: ExportOptions, say: Say) -> list[Exported]:
    """Exported students with a check on these rows, which is kept with them; what is known is not measured again."""
    with StudentToExport(name, options) as student:
        current = student.eval_model.weights
        for each in exported:
            if each.record.get("student", {}).get("weights", current) != current:
                say(f"{each.name}: it was made of other weights than {name} has now.")
        asked = _conditions(student)
        return [each if each.record.get("conditions") == asked else _checked(each, student, say) for each in exported]


def measured_student(name: str, options: ExportOptions) -> dict[str, Any]:
    """Size, load time and speed of the student itself, as transformers runs it where exports are checked."""
    with StudentToExport(name, options) as student:
        size = sum(path.stat().st_size for path in Path(student.folder).glob("*.safetensors"))
        runtime = TransformersRuntime(student.folder, options.device)
        facts = {"bytes": size, "runtime": runtime.name, "load_seconds": runtime.load_seconds}
        return {**facts, **runtime.speed(student.vocab_size)}


def place_of(spec: ExportSpec, student: StudentToExport) -> Path:
    """The folder of a format: in that of the run or the model, under runs/ for a model of the Hub."""
    own = Path(student.eval_model.adapter or student.eval_model.path)
    return (own if own.is_dir() else results_folder(student.eval_model.name)) / FOLDER / spec.name


def _check_place(folder: Path) -> None:
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).is_file()):
        raise UserError(f"{folder} holds something else than an exported student. Name another folder with --output.")


def _exported(spec: ExportSpec, folder: Path, student: StudentToExport, writer: Writer, say: Say) -> Exported:
    settings = _settings(spec, student)
    known = Exported.read(folder) if (folder / RECORD).is_file() else None
    if known is not None and not _is_same(known, spec, settings, student):
        say(f"{spec.name}: {folder} holds another student or other settings, and is written again.")
        known = None
    elif known is not None:
        say(f"{spec.name}: {folder} is written already.")
    if known is None:
        say(f"{spec.name}: writing {folder}.")
        known = _write(spec, folder, student, writer, settings)
    for note in known.record["notes"]:
        say(f"{spec.name}: {note}")
    if known.record.get("conditions") != _conditions(student):
        known = _checked(known, student, say)
    return known


def _write(
    spec: ExportSpec, folder: Path, student: StudentToExport, writer: Writer, settings: Mapping[str, Any]
) -> Exported:
    with new_folder(folder) as scratch:
        written = writer(student.folder, scratch)
        # Whoever loads the folder needs them, and not every writer adds them.
        trusted = student.options.trust_remote_code
        load_processing_class(student.folder, trust_remote_code=trusted).save_pretrained(scratch)
        for beside in ("config.json", "generation_config.json"):
            if not (scratch / beside).exists() and (Path(student.folder) / beside).is_file():
                shutil.copyfile(Path(student.folder) / beside, scratch / beside)
        files = sorted(path for path in scratch.rglob("*") if path.is_file())
        record = {
            "schema": SCHEMA,
            "format": spec.format,
            "quantization": spec.quantization,
            "main": written.main,
            "made_by": {"mmkd": __version__, "writer": written.made_by},
            "student": {"name": student.eval_model.name, "weights": student.eval_model.weights},
            "settings": dict(settings),
            "bytes": sum(path.stat().st_size for path in files if path.suffix in WEIGHTS),
            "files": {
                path.relative_to(scratch).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
                for path in files
            },
            "notes": list(written.notes),
            "date": datetime.now(UTC).isoformat("T", "seconds"),
            "warnings": [],
            "checks": {},
        }
        write_record(scratch, record)
    return Exported.read(folder)


def _checked(exported: Exported, student: StudentToExport, say: Say) -> Exported:
    """The same with what runtimes make of it, and how fast."""
    warnings = _unread(exported)
    device, length = student.options.device, student.options.max_length
    checks: dict[str, dict[str, Any]] = {}
    if exported.spec.format != "gguf" or has_llama_cpp() or not (exported.folder / TOWER).is_file():
        checks |= [_check(runtime_of(exported, device, length), student, warnings)]
    if exported.spec.facts.served and student.vllm is not None:
        say(f"{exported.name}: vLLM {student.vllm.version} reads it, which takes a minute.")
        try:
            served = VLLMRuntime(exported.folder, student.vllm, exported.spec.quantization, length)
            name, facts = _check(served, student, warnings)
            checks[name] = facts
        except UserError as error:
            warnings.append(f"{error} transformers read the file.")
    elif exported.spec.facts.served:
        warnings.append(
            "vLLM was not tried here: transformers read the file. The kernels of vLLM may compute otherwise. "
            "scripts/serve_teacher.sh --setup installs it, and --vllm names a Python that has it."
        )
    for warning in warnings:
        say(f"{exported.name}: {warning}")
    return exported.with_facts(checks=checks, warnings=warnings, conditions=_conditions(student))


def _check(runtime: Runtime, student: StudentToExport, warnings: list[str]) -> tuple[str, dict[str, Any]]:
    """The short name of a runtime, and what it makes of an export; adds to `warnings`, and closes the runtime."""
    views = [view for view in student.views if runtime.reads_images or not has_images(view)]
    try:
        facts: dict[str, Any] = {"runtime": runtime.name, "load_seconds": runtime.load_seconds}
        facts |= runtime.speed(student.vocab_size)
        if views:
            (apart,) = difference(student.model, views, [runtime], tokenizer_of(student.processing_class))
            facts |= apart
    finally:
        runtime.close()
    if not views:
        why = "is not given images here: name rows of text with --data" if student.views else "has no rows to read"
        warnings.append(f"{runtime.name} loaded it, and was not compared with the student: it {why}.")
    if facts.get("same_tokens", 1) < 1:
        warnings.append(
            f"Its own tokenizer reads {1 - facts['same_tokens']:.0%} of the rows as other tokens than the student's."
        )
    return _short(runtime.name), {**facts, "machine": machine()}


def _unread(exported: Exported) -> list[str]:
    """Says where a GGUF file is not read by llama.cpp here."""
    if exported.spec.format != "gguf" or has_llama_cpp():
        return []
    tower = (exported.folder / TOWER).is_file()
    instead = "nothing has read the file" if tower else "transformers read the weights of the file"
    return [f"llama.cpp is not installed here, so it was not tried: {instead}. pip install llama-cpp-python."]


def _short(runtime: str) -> str:
    return runtime.partition(" ")[0].lower()


def _settings(spec: ExportSpec, student: StudentToExport) -> dict[str, Any]:
    """What decides the content of an export, beside the student."""
    settings: dict[str, Any] = {}
    if spec.format not in ("gguf", "onnx"):
        settings |= {"quantisation": student.quantisation(spec.quantization).as_dict()}
    if spec.facts.calibrates:
        rows = json.dumps(student.calibration_ids).encode()
        settings |= {"calibration": student.data, "rows": hashlib.sha256(rows).hexdigest()}
    return settings


def _conditions(student: StudentToExport) -> dict[str, Any]:
    """What decides the outcome of a check, beside both models."""
    options, vllm = student.options, student.vllm
    facts = {"data": student.data, "rows": options.rows, "max_length": options.max_length, "device": options.device}
    return facts if vllm is None else {**facts, "vllm": vllm.version}


def _is_same(known: Exported, spec: ExportSpec, settings: Mapping[str, Any], student: StudentToExport) -> bool:
    record = known.record
    same = known.spec == spec and record["settings"] == json.loads(json.dumps(settings))
    return same and record["student"]["weights"] == student.eval_model.weights
