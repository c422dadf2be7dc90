"""Checks of `mmkd doctor` on a recipe of method dho: data, labels, pictures, student and teacher of classes."""

import copy
import importlib.util
from collections import Counter
from typing import Any

from accelerate import init_empty_weights
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer

from mmkd.data.classification import HIDDEN
from mmkd.errors import UserError
from mmkd.preflight.book import Book
from mmkd.preflight.costs import device_memory
from mmkd.preflight.facts import Finding, listed
from mmkd.preflight.picture_checks import readable_pictures
from mmkd.preflight.whole_model import training_state
from mmkd.recipe.recipe import Run
from mmkd.recipe.run import check_surroundings
from mmkd.teachers.aspects import has_aspects, read_aspects
from mmkd.teachers.class_logits import has_class_logits, read_class_logits, rows_digest
from mmkd.teachers.classifiers import OPEN_CLIP, check_classes
from mmkd.units import readable_size

from .class_aspects import aspects_folder
from .class_run import Classes, check_arguments, load_classes, settings_of
from .class_teacher import logits_folder, runs_of_teachers
from .dho_build import new_student, student_processor


def examine_classes(run: Run, sharded: bool) -> list[Finding]:
    """What all checks of a recipe of classes found; a check that cannot be made is a problem."""
    book = Book()
    book.attempt("settings", check_surroundings, run)
    book.attempt("settings", check_arguments, run)
    classes = book.attempt("data", load_classes, run)
    if classes is None or run.arguments.student is None:
        return book.findings
    book.check("data", _data, classes)
    book.check("labels", _labels, classes, run)
    if not classes.is_text:
        book.check("images", readable_pictures, len(classes.rows), classes.rows.raw)
    book.check("student", _student, classes, run)
    if settings_of(run).aspects is not None:
        book.check("aspects", _aspects, classes, run)
    if settings_of(run).asks_teacher:
        for part in runs_of_teachers(run).values():
            book.check("teacher", _teacher, classes, part)
    return book.findings


def check_classes_run(run: Run) -> None:
    """Raises UserError for settings, data and labels that training would refuse."""
    check_arguments(run)
    _labels(load_classes(run), run)


def empty_class_student(run: Run, classes: Classes) -> Any:
    """The student without weights. Raises UserError for a backbone that gives no features."""
    hub = {"revision": run.student.model_revision, "trust_remote_code": run.training.trust_remote_code}
    AutoConfig.from_pretrained(str(run.arguments.student), **hub)
    made = copy.copy(run)
    made.arguments = copy.copy(run.arguments)
    made.arguments.student_init = "random"
    with init_empty_weights(include_buffers=False):
        return new_student(made, classes.data)


def _data(classes: Classes) -> list[Finding]:
    data, counts = classes.data, Counter(classes.rows.labels[classes.rows.labels != HIDDEN].tolist())
    sizes = {"train": data.train, "validation": data.validation, "test": data.test, "unlabeled": data.unlabeled}
    rows = ", ".join(f"{len(split):,} {name}" for name, split in sizes.items() if split is not None)
    names = data.class_names
    of_each = sorted(counts[number] for number in range(len(names)))
    fewest, most = of_each[0], of_each[-1]
    each = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
    findings = [Finding("ok", "data", f"{len(names)} classes, {each} labelled rows of each; {rows}.")]
    for name in ("validation", "test"):
        split = sizes[name]
        if split is None:
            continue
        absent = [names[number] for number in sorted({*range(len(names))} - {*split["label"]})]
        if absent:
            text = f"{name} has no row of {len(absent)} classes: {listed(absent)}."
            findings.append(Finding("warning", "data", text, f"What {name} measures says nothing about them."))
    return findings


def _labels(classes: Classes, run: Run) -> list[Finding]:
    """Raises UserError where training would, in the same words."""
    args, data = settings_of(run), classes.data
    shown = args.shown_labels(classes.rows.labels, data.class_names)
    args.check_unlabeled(shown)
    args.check_validation(data.validation is not None)
    labeled = int((shown != HIDDEN).sum())
    return [
        Finding("ok", "labels", f"{labeled:,} rows are learnt with their label, {len(shown) - labeled:,} without.")
    ]


def _student(classes: Classes, run: Run) -> list[Finding]:
    student_processor(run, classes.is_text)
    student = empty_class_student(run, classes)
    # Activations of students of classes are small beside a teacher.
    total = sum(training_state(student, settings_of(run)).values())
    device, room = device_memory()
    text = f"{student.num_parameters() / 1e6:.2f} M parameters; weights, gradients and optimizer take "
    text += f"{readable_size(total)} of the "
    text += f"{readable_size(room)} of {device}."
    return [Finding("ok" if total < 0.8 * room else "warning", "student", text)]


def _teacher(classes: Classes, run: Run) -> list[Finding]:
    """Whether the teacher is of its kind and knows the classes, and whether its logits are there already."""
    arguments = run.arguments
    folder = logits_folder(run)
    findings: list[Finding] = []
    if has_class_logits(folder):
        expected: dict[str, Any] = {"class_names": list(classes.data.class_names)}
        rows = read_class_logits(folder, expected).logits
        findings.append(Finding("ok", "teacher", f"Its logits of {len(rows):,} rows are in {folder}."))
        if len(rows) != len(classes.rows):
            raise UserError(
                f"The class logits in {folder} are of {len(rows):,} rows, and there are {len(classes.rows):,} "
                "training rows. Name another folder as teacher_cache, or delete this one.",
                because="meaning",
            )
    elif arguments.teacher is None:
        # In the words in which training refuses it.
        read_class_logits(folder, {})
    if arguments.teacher is not None:
        findings.append(_kind(arguments.teacher, classes, run))
    return findings


def _aspects(classes: Classes, run: Run) -> list[Finding]:
    """Whether the answers to aspects are there, or somebody is to give them."""
    training, rows, folder = settings_of(run), classes.rows, aspects_folder(run)
    if training.lacks_questions:
        text = f"{training.aspects} is to be written: mmkd cache build RECIPE --job aspects."
        return [Finding("warning", "aspects", text, "Read the questions before you train on the answers.")]
    if has_aspects(folder, len(rows)):
        answers = read_aspects(folder, len(rows), training.questions, rows_digest(rows.content, len(rows)))
        text = f"The answers about {len(rows):,} images to {answers.shape[1]} questions are in {folder}."
        return [Finding("ok", "aspects", text)]
    who = training.aspects_model or training.aspects_server
    if who is None:
        read_aspects(folder, len(rows), training.questions, "")
    text = f"{who} is to answer {len(training.questions)} questions about each of {len(rows):,} images, once."
    return [Finding("ok", "aspects", text)]


def _kind(name: str, classes: Classes, run: Run) -> Finding:
    kind, hub = settings_of(run).teacher_kind, run.hub(run.arguments.teacher_revision)
    compares = kind in ("zero_shot", "tip_adapter")
    if compares and classes.is_text:
        raise UserError(
            f"teacher_kind {kind} compares images with prompts; texts need classifier or question.", because="meaning"
        )
    if name.startswith(OPEN_CLIP):
        if importlib.util.find_spec("open_clip") is None:
            raise UserError(f"The teacher {name} needs open_clip: pip install open_clip_torch.")
        return Finding("ok", "teacher", f"{name} is a model of open_clip.")
    config: Any = AutoConfig.from_pretrained(name, **hub)
    if compares and not (hasattr(config, "text_config") and hasattr(config, "vision_config")):
        raise UserError(
            f"The teacher {name} is a {config.model_type}, which does not embed images and texts in one space. Take a "
            "CLIP- or SigLIP-like teacher, or another teacher_kind.",
            because="meaning",
        )
    if kind in ("classifier", "masked"):
        check_classes(config.num_labels, classes.data.class_names, "The teacher")
    auto_class: Any = (
        AutoTokenizer if classes.is_text else AutoImageProcessor if kind in ("classifier", "masked") else AutoProcessor
    )
    auto_class.from_pretrained(name, **hub)
    return Finding("ok", "teacher", f"{name} is a {config.model_type}, asked as {kind}.")
