"""Checks of `mmkd doctor` on a recipe of method dho: data, labels, pictures, student and teacher of classes."""

import copy
import importlib.util
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, PreTrainedModel

from mmkd.data.class_rows import ClassRows
from mmkd.data.classification import HIDDEN, ClassificationData, ClassificationRecipe, hide_labels, load_classification
from mmkd.errors import UserError
from mmkd.preflight.book import Book
from mmkd.preflight.costs import device_memory
from mmkd.preflight.estimate import optimizer_bytes
from mmkd.preflight.facts import Finding, listed
from mmkd.recipe.recipe import Run
from mmkd.recipe.run import check_surroundings
from mmkd.teachers.class_logits import has_class_logits, read_class_logits
from mmkd.teachers.classifiers import OPEN_CLIP, check_classes
from mmkd.units import readable_size

from .dho_build import LOGITS_FOLDER, check_arguments, new_student, student_processor, with_unlabeled
from .dho_config import DHOConfig

# Each is opened and decoded.
_PICTURES = 64


@dataclass(frozen=True)
class Classes:
    """The data of a recipe of classes."""

    data: ClassificationData
    rows: ClassRows
    """Those of train and, after them, the unlabelled ones."""

    @property
    def is_text(self) -> bool:
        return self.data.recipe.text is not None


def examine_classes(run: Run, sharded: bool) -> list[Finding]:
    """What all checks of a recipe of classes found; a check that cannot be made is a problem."""
    book = Book()
    book.attempt("settings", check_surroundings, run)
    book.attempt("settings", check_arguments, run)
    found = book.attempt("data", load_classes, run)
    if found is None or run.arguments.student is None:
        return book.findings
    book.check("data", _data, found)
    book.check("labels", _labels, found, run)
    if not found.is_text:
        book.check("images", _pictures, found)
    book.check("student", _student, found, run)
    if _config(run).objective != "ce":
        book.check("teacher", _teacher, found, run)
    return book.findings


def check_classes_run(run: Run) -> None:
    """Raises UserError for settings, data and labels that training would refuse."""
    check_arguments(run)
    _labels(load_classes(run), run)


def load_classes(run: Run) -> Classes:
    """The rows of a recipe of classes. Raises UserError as `load_classification` does."""
    arguments = run.arguments
    recipe = ClassificationRecipe.load(arguments.data)
    caps: dict[str, Any] = {"max_train_rows": arguments.max_train_rows, "max_eval_rows": arguments.max_eval_rows}
    data = load_classification(recipe, **caps)
    return Classes(data, ClassRows(with_unlabeled(data), None))


def empty_class_student(run: Run, found: Classes) -> Any:
    """The student without weights. Raises UserError for a backbone that gives no features."""
    hub = {"revision": run.student.model_revision, "trust_remote_code": run.training.trust_remote_code}
    AutoConfig.from_pretrained(str(run.arguments.student), **hub)
    made = copy.copy(run)
    made.arguments = copy.copy(run.arguments)
    made.arguments.student_init = "random"
    with init_empty_weights(include_buffers=False):
        return new_student(made, found.data)


def _config(run: Run) -> DHOConfig:
    config: Any = run.training
    assert isinstance(config, DHOConfig)
    return config


def _data(found: Classes) -> list[Finding]:
    data, counts = found.data, Counter(found.rows.labels[found.rows.labels != HIDDEN].tolist())
    sizes = {"train": data.train, "validation": data.validation, "test": data.test, "unlabeled": data.unlabeled}
    rows = ", ".join(f"{len(split):,} {name}" for name, split in sizes.items() if split is not None)
    names = data.class_names
    of_each = sorted(counts[number] for number in range(len(names)))
    findings = [
        Finding(
            "ok", "data", f"{len(names)} classes, {of_each[0]:,} to {of_each[-1]:,} labelled rows of each; {rows}."
        )
    ]
    for name in ("validation", "test"):
        split = sizes[name]
        if split is None:
            continue
        absent = [names[number] for number in sorted({*range(len(names))} - {*split["label"]})]
        if absent:
            text = f"{name} has no row of {len(absent)} classes: {listed(absent)}."
            findings.append(Finding("warning", "data", text, f"What {name} measures says nothing about them."))
    return findings


def _labels(found: Classes, run: Run) -> list[Finding]:
    """Raises UserError where training would, in the same words."""
    args, data = _config(run), found.data
    shown = hide_labels(
        found.rows.labels, data.class_names, args.labels_per_class, args.label_fraction, args.label_seed
    )
    args.check_unlabeled(shown)
    args.check_validation(data.validation is not None)
    labeled = int((shown != HIDDEN).sum())
    return [
        Finding("ok", "labels", f"{labeled:,} rows are learnt with their label, {len(shown) - labeled:,} without.")
    ]


def _pictures(found: Classes) -> list[Finding]:
    rows = found.rows
    places = np.sort(np.random.default_rng(0).permutation(len(rows))[:_PICTURES]).tolist()
    bad: dict[int, str] = {}
    for row in places:
        try:
            rows.raw(row)
        except UserError as error:
            bad[row] = str(error).splitlines()[0]
    if not bad:
        return [Finding("ok", "images", f"{len(places)} of {len(rows):,} pictures, drawn at random, can be read.")]
    text = f"{len(bad)} of {len(places)} pictures, drawn at random, cannot be read: {listed(bad.values())}"
    return [Finding("problem", "images", text, "Training stops at the first one: correct them.")]


def training_state(student: PreTrainedModel, args: DHOConfig) -> dict[str, float]:
    """Bytes that stay on a device from step to step, by what they are for."""
    tensors = [*student.parameters(), *student.buffers()]
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    return {
        "student weights": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "gradients": sum(parameter.numel() * parameter.element_size() for parameter in trained),
        "optimizer": optimizer_bytes(args) * sum(parameter.numel() for parameter in trained),
    }


def _student(found: Classes, run: Run) -> list[Finding]:
    student_processor(run, found.is_text)
    student = empty_class_student(run, found)
    # Activations of students of classes are small beside a teacher.
    total = sum(training_state(student, _config(run)).values())
    device, room = device_memory()
    text = f"{student.num_parameters() / 1e6:.2f} M parameters; weights, gradients and optimizer take "
    text += f"{readable_size(total)} of the "
    text += f"{readable_size(room)} of {device}."
    return [Finding("ok" if total < 0.8 * room else "warning", "student", text)]


def _teacher(found: Classes, run: Run) -> list[Finding]:
    """Whether the teacher is of its kind and knows the classes, and whether its logits are there already."""
    arguments, args = run.arguments, _config(run)
    folder = Path(arguments.teacher_cache or Path(args.output_dir or ".") / LOGITS_FOLDER)
    findings: list[Finding] = []
    if has_class_logits(folder):
        expected: dict[str, Any] = {"class_names": list(found.data.class_names)}
        rows = read_class_logits(folder, expected).logits
        findings.append(Finding("ok", "teacher", f"Its logits of {len(rows):,} rows are in {folder}."))
        if len(rows) != len(found.rows):
            raise UserError(
                f"The class logits in {folder} are of {len(rows):,} rows, and there are {len(found.rows):,} training "
                "rows. Name another folder as teacher_cache, or delete this one."
            )
    elif arguments.teacher is None:
        # In the words in which training refuses it.
        read_class_logits(folder, {})
    if arguments.teacher is not None:
        findings.append(_kind(arguments.teacher, found, run))
    return findings


def _kind(name: str, found: Classes, run: Run) -> Finding:
    kind, hub = _config(run).teacher_kind, run.hub(run.arguments.teacher_revision)
    compares = kind in ("zero_shot", "tip_adapter")
    if compares and found.is_text:
        raise UserError(f"teacher_kind {kind} compares images with prompts; texts need classifier or question.")
    if name.startswith(OPEN_CLIP):
        if importlib.util.find_spec("open_clip") is None:
            raise UserError(f"The teacher {name} needs open_clip: pip install open_clip_torch.")
        return Finding("ok", "teacher", f"{name} is a model of open_clip.")
    config: Any = AutoConfig.from_pretrained(name, **hub)
    if compares and not (hasattr(config, "text_config") and hasattr(config, "vision_config")):
        raise UserError(
            f"The teacher {name} is a {config.model_type}, which does not embed images and texts in one space. Take a "
            "CLIP- or SigLIP-like teacher, or another teacher_kind."
        )
    if kind == "classifier":
        check_classes(config.num_labels, found.data.class_names, "The teacher")
    auto_class: Any = AutoTokenizer if found.is_text else AutoImageProcessor if kind == "classifier" else AutoProcessor
    auto_class.from_pretrained(name, **hub)
    return Finding("ok", "teacher", f"{name} is a {config.model_type}, asked as {kind}.")
