"""The teacher of a recipe of classes, and its logits of every training row on disk."""

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
)

from mmkd.cache.identity import saved_dtype, weights_sha256
from mmkd.data.classification import HIDDEN, ClassificationData
from mmkd.errors import UserError
from mmkd.models.load import computed_dtype, load_model
from mmkd.precision import name_of_dtype
from mmkd.recipe.recipe import Run
from mmkd.teachers.class_embeddings import (
    compute_embeddings,
    embedding_teacher,
    has_embeddings,
    read_embeddings,
    write_embeddings,
)
from mmkd.teachers.class_logits import (
    ClassLogits,
    captions_digest,
    class_identity,
    compute_class_logits,
    has_class_logits,
    read_class_logits,
    rows_digest,
    write_class_logits,
)
from mmkd.teachers.class_signals import ClassSignals, check_texts
from mmkd.teachers.classifiers import (
    OPEN_CLIP,
    ClassifierTeacher,
    ClassTeacher,
    OpenClipEmbedder,
    QuestionTeacher,
    TipAdapterTeacher,
    TransformersEmbedder,
    ZeroShotTeacher,
)
from mmkd.teachers.masked_classifier import MaskedTeacher

from .class_aspects import build_class_aspects
from .class_run import Classes, check_arguments, load_classes, settings_of
from .dho_config import DHOConfig
from .unseen_classes import UnseenClasses

LOGITS_FOLDER = "teacher_logits"
"""Where in output_dir a run without teacher_cache keeps its teacher's logits."""


def logits_folder(run: Run) -> Path:
    """Where the teacher's logits of a run are, or will be."""
    return Path(run.arguments.teacher_cache or Path(run.training.output_dir or ".") / LOGITS_FOLDER)


def build_class_cache(run: Run) -> Path:
    """Writes the teacher's logits of all training rows, unless they are there; the folder.

    Raises UserError for a recipe without a teacher to ask or a place to write to, and for logits of something else.
    """
    check_arguments(run)
    arguments = run.arguments
    if run.cache.job == "aspects":
        return build_class_aspects(run)
    if arguments.teachers is None and (arguments.teacher is None or arguments.teacher_cache is None):
        raise UserError("A cache needs `teacher` (whose answers they are) and `teacher_cache` (the folder to write).")
    cached_signals(run, load_classes(run))
    return logits_folder(run)


def cached_signals(run: Run, classes: Classes) -> tuple[ClassSignals, ClassTeacher | None]:
    """What the teachers say of every training row, from caches or computed and written there.

    And the teacher, if it is named; of several, the first, whose features and texts are those that embeddings are
    compared with.
    """
    runs = runs_of_teachers(run)
    if len(runs) == 1:
        return _cached(run, classes)
    answers = [_cached(part, classes, embeds=number == 0) for number, part in enumerate(runs.values())]
    logits = [signals.logits for signals, _ in answers if signals.logits is not None]
    assert run.arguments.teachers is not None
    assert isinstance(run.arguments.teachers, dict)
    weights = tuple(float(keys.get("weight", 1)) for keys in run.arguments.teachers.values())
    first, teacher = answers[0]
    return ClassSignals(torch.stack(logits, 1) if logits else None, first.embeddings, weights=weights), teacher


def runs_of_teachers(run: Run) -> dict[str, Run]:
    """The run as each of its teachers sees it, by the teacher's name: "" where it is the only one."""
    arguments = run.arguments
    if arguments.teachers is None:
        return {"": run}
    assert isinstance(arguments.teachers, dict)
    parts: dict[str, Run] = {}
    for name, keys in arguments.teachers.items():
        training = copy.copy(settings_of(run))
        own = {key: value for key, value in keys.items() if key != "weight"}
        for key in [key for key in own if hasattr(training, key)]:
            setattr(training, key, own.pop(key))
        own.setdefault("teacher_cache", str(logits_folder(run) / name))
        parts[name] = replace(run, training=training, arguments=replace(arguments, teachers=None, **own))
    return parts


def _cached(run: Run, classes: Classes, embeds: bool = True) -> tuple[ClassSignals, ClassTeacher | None]:
    """What a teacher says of every training row, and the teacher, if it is named."""
    training, folder = settings_of(run), logits_folder(run)
    wanted = {"logits": training.distils, "embeddings": embeds and bool(training.term_weights)}
    arguments, rows, names = run.arguments, classes.rows, classes.data.class_names
    digest = rows_digest(rows.content, len(rows))
    expected: dict[str, Any] = {"class_names": list(names), "rows": digest}
    name = arguments.teacher
    if name is None:
        return _read(folder, expected, wanted), None
    teacher = load_class_teacher(run, classes)
    # open_clip keeps its weights in files of its own; its names are precise.
    weights = None if name.startswith(OPEN_CLIP) else weights_sha256(name, arguments.teacher_revision)
    identity = class_identity(name, weights, teacher, names, digest)
    # One rank asks, the others read what it wrote.
    with training.main_process_first(desc="teacher logits"):
        if wanted["logits"] and not has_class_logits(folder):
            print(f"Asking the teacher about {len(rows):,} rows, once: {folder}", file=sys.stderr)
            logits = compute_class_logits(teacher, rows.raw, len(rows), training.teacher_batch_size)
            # Recorded, and not compared: the same teacher in another type is the same teacher.
            write_class_logits(folder, ClassLogits(logits, identity | _computed_in(run)))
        captions = rows.captions if "caption" in rows.dataset.column_names else None
        captioned = identity | {"captions": None if captions is None else captions_digest(captions)}
        if wanted["embeddings"] and not has_embeddings(folder):
            print(f"Asking the teacher for features of {len(rows):,} rows, once: {folder}", file=sys.stderr)
            embeddings = compute_embeddings(teacher, rows.raw, len(rows), captions, training.teacher_batch_size)
            write_embeddings(folder, embeddings, captioned | _computed_in(run))
    return _read(folder, identity, wanted, captioned), teacher


def _read(
    folder: Path, identity: dict[str, Any], wanted: dict[str, bool], captioned: dict[str, Any] | None = None
) -> ClassSignals:
    logits = read_class_logits(folder, identity).logits if wanted["logits"] else None
    embeddings = read_embeddings(folder, captioned or identity) if wanted["embeddings"] else None
    return ClassSignals(logits, embeddings)


def unseen_classes(run: Run, classes: Classes, teacher: ClassTeacher | None) -> UnseenClasses | None:
    """The rows of classes that training never sees, with the teacher's texts of them."""
    if classes.unseen is None:
        return None
    if teacher is None:
        raise UserError(
            "unseen_classes asks the teacher for texts of these classes; set `teacher`.", because="meaning"
        )
    seen = embedding_teacher(teacher)
    names, data = classes.unseen.class_names, classes.data
    text = ZeroShotTeacher(seen.embedder, names, data.recipe.prompts, seen.normalize_mean).text_weights
    check_texts(text, names)
    return UnseenClasses(classes.unseen.rows, text)


def load_class_teacher(run: Run, classes: Classes) -> ClassTeacher:
    """The teacher of a recipe, ready to be asked; of kind tip_adapter it learns from the labels shown first."""
    arguments, training, data, text = run.arguments, settings_of(run), classes.data, classes.is_text
    assert arguments.teacher is not None
    kind, name = training.teacher_kind, arguments.teacher
    if kind in ("zero_shot", "tip_adapter"):
        if text:
            raise UserError(
                f"teacher_kind {kind} compares images with prompts; texts need classifier or question.",
                because="meaning",
            )
        teacher = zero_shot(run, data)
        return teacher if kind == "zero_shot" else _tip_adapter(training, teacher, classes)
    hub = {"revision": arguments.teacher_revision, "trust_remote_code": training.trust_remote_code}
    loading = {"dtype": _teacher_dtype(run), **hub}
    if arguments.teacher_attn_implementation is not None:
        loading["attn_implementation"] = arguments.teacher_attn_implementation
    if kind in ("classifier", "masked"):
        auto_class: Any = AutoModelForSequenceClassification if text else AutoModelForImageClassification
        processor: Any = (AutoTokenizer if text else AutoImageProcessor).from_pretrained(name, **hub)
        classifier = auto_class.from_pretrained(name, use_safetensors=True, **loading)
        teacher = ClassifierTeacher(classifier.to(training.device), processor, data.class_names)
        return teacher if kind == "classifier" else _masked(training, teacher, classes, hub)
    model: Any = load_model(name, "teacher", **loading)
    processor = (AutoTokenizer if text else AutoProcessor).from_pretrained(name, **hub)
    return QuestionTeacher(model.to(training.device), processor, data.class_names, training.teacher_question)


def _teacher_dtype(run: Run) -> str | torch.dtype:
    """The type that a teacher of transformers is loaded in, one that the run's device multiplies."""
    arguments = run.arguments
    assert arguments.teacher is not None
    hub = {"revision": arguments.teacher_revision, "trust_remote_code": run.training.trust_remote_code}
    config = AutoConfig.from_pretrained(arguments.teacher, **hub)
    return computed_dtype(arguments.teacher_dtype, config, run.training.device)


def _computed_in(run: Run) -> dict[str, str]:
    """What the class logits' record says of the type they were computed in; nothing of open_clip's own models."""
    arguments = run.arguments
    assert arguments.teacher is not None
    if arguments.teacher.startswith(OPEN_CLIP):
        return {}
    dtype = _teacher_dtype(run)
    return {
        "dtype": saved_dtype(arguments.teacher, arguments.teacher_revision)
        if dtype == "auto"
        else name_of_dtype(dtype)
    }


def zero_shot(run: Run, data: ClassificationData) -> ZeroShotTeacher:
    """The teacher of a recipe as a comparison of images with prompts. Raises UserError when the recipe names none."""
    arguments, training = run.arguments, settings_of(run)
    name = arguments.teacher
    if name is None:
        raise UserError("head_init: text asks the teacher for its text embeddings; set `teacher`.", because="meaning")
    if name.startswith(OPEN_CLIP):
        embedder: Any = OpenClipEmbedder(name, training.device)
    else:
        hub = {"revision": arguments.teacher_revision, "trust_remote_code": training.trust_remote_code}
        embedder = TransformersEmbedder.load(name, dtype=_teacher_dtype(run), **hub)
        embedder.model.to(training.device)
    return ZeroShotTeacher(embedder, data.class_names, data.recipe.prompts, training.normalize_prompt_mean)


def _masked(training: DHOConfig, teacher: ClassifierTeacher, classes: Classes, hub: dict[str, Any]) -> MaskedTeacher:
    """A classifier masked for a student. Raises UserError for texts, and where a setting is missing."""
    layer, name = training.mask_layer, training.mask_student
    if classes.is_text:
        raise UserError(
            "teacher_kind masked masks classifiers of images. Use teacher_kind: classifier.", because="not built"
        )
    if layer is None or name is None:
        raise UserError(
            "teacher_kind masked needs mask_layer (a module of the teacher) and mask_student (the student that the "
            "teacher is masked for: a Hub id or a folder)."
        )
    trust = {"trust_remote_code": hub["trust_remote_code"]}
    model: Any = AutoModelForImageClassification.from_pretrained(name, use_safetensors=True, **trust)
    processor: Any = AutoImageProcessor.from_pretrained(name, **trust)
    student = ClassifierTeacher(model.to(training.device), processor, classes.data.class_names)
    masked = MaskedTeacher(teacher, student, layer, name)
    size, seed = training.teacher_batch_size, training.label_seed
    masked.learn_from(
        classes.rows.raw, len(classes.rows), size, training.mask_epochs, training.mask_learning_rate, seed
    )
    return masked


def _tip_adapter(training: DHOConfig, teacher: ZeroShotTeacher, classes: Classes) -> TipAdapterTeacher:
    rows = classes.rows
    labels = training.shown_labels(rows.labels, classes.data.class_names)
    shown = np.flatnonzero(labels != HIDDEN)
    return TipAdapterTeacher.fit(
        teacher,
        [rows.raw(int(row)) for row in shown],
        labels[shown].tolist(),
        alpha=training.tip_alpha,
        beta=training.tip_beta,
        seed=training.label_seed,
    )
