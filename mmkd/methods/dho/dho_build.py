"""The trainer of a recipe of method dho: data, teacher with its cached logits, and student."""

import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from jaxtyping import Bool, Int
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.trainer_utils import set_seed

from mmkd.cache.identity import saved_dtype, weights_sha256
from mmkd.data.class_rows import ClassRows
from mmkd.data.classification import HIDDEN, ClassificationData, ClassificationRecipe, hide_labels, load_classification
from mmkd.errors import UserError
from mmkd.models.dual_head import DualHeadForImageClassification, DualHeadForSequenceClassification
from mmkd.models.load import computed_dtype, load_model
from mmkd.precision import name_of_dtype
from mmkd.recipe.arguments import RunArguments
from mmkd.recipe.recipe import Run
from mmkd.teachers.class_logits import (
    ClassLogits,
    class_identity,
    compute_class_logits,
    has_class_logits,
    read_class_logits,
    rows_digest,
    write_class_logits,
)
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

from .dho_trainer import DHOConfig, DHOTrainer

_JUDGED = 256
"""Rows that a dry run judges the teacher by, at most."""

LOGITS_FOLDER = "teacher_logits"
"""Where in output_dir a run without teacher_cache keeps its teacher's logits."""

# What a recipe of every method may set, and a classifier's run reads.
_READ = {"method", "data", "teacher", "teacher_revision", "teacher_dtype", "teacher_attn_implementation"}
_READ |= {"teacher_cache", "student", "student_init", "max_train_rows", "max_eval_rows", "dry_run"}


def build_dho_trainer(run: Run) -> DHOTrainer:
    """The trainer of a recipe of method dho. Raises UserError for what a classifier's run cannot use."""
    arguments, training = run.arguments, _config(run)
    check_arguments(run)
    recipe = ClassificationRecipe.load(arguments.data)
    data = load_classification(recipe, max_train_rows=arguments.max_train_rows, max_eval_rows=arguments.max_eval_rows)
    train = with_unlabeled(data)
    processing_class = student_processor(run, text=recipe.text is not None)
    rows = ClassRows(
        train,
        processing_class,
        augmentation=training.augmentation,
        max_length=training.max_length,
        keep=training.keep_rows,
    )
    logits, teacher = None, None
    if training.objective != "ce":
        logits, teacher = _teacher_logits(run, data, rows)
    set_seed(training.seed)
    model = new_student(run, data)
    if training.head_init == "text":
        teacher = _zero_shot(run, data) if teacher is None else teacher
        zero_shot = teacher.zero_shot if isinstance(teacher, TipAdapterTeacher) else teacher
        if not isinstance(zero_shot, ZeroShotTeacher):
            raise UserError(f"head_init: text needs a teacher with text embeddings, not {training.teacher_kind}.")
        model.init_heads(zero_shot.text_embeddings)
    return DHOTrainer(
        model=model,
        teacher=logits,
        args=training,
        train_dataset=rows,
        eval_dataset=data.validation,
        test_dataset=data.test,
        processing_class=processing_class,
    )


def dry_run_dho(run: Run, console: Console) -> None:
    """Prints the plan of a run: student, classes, rows and steps, and how long the teacher takes, by a few rows."""
    arguments, training = run.arguments, _config(run)
    check_arguments(run)
    data = load_classification(
        ClassificationRecipe.load(arguments.data),
        max_train_rows=arguments.max_train_rows,
        max_eval_rows=arguments.max_eval_rows,
    )
    rows = ClassRows(with_unlabeled(data), student_processor(run, data.recipe.text is not None))
    shown = hide_labels(
        rows.labels, data.class_names, training.labels_per_class, training.label_fraction, training.label_seed
    )
    labeled = int((shown != HIDDEN).sum())
    unlabeled = len(rows) - labeled
    table = Table(title="mmkd dho: dry run", show_header=False)
    table.add_row("student", f"{new_student(run, data).num_parameters() / 1e6:.2f} M parameters, {training.objective}")
    table.add_row("classes", f"{len(data.class_names)}: {', '.join(data.class_names[:6])}, ...")
    table.add_row("rows", f"{labeled:,} labelled, {unlabeled:,} unlabelled")
    for name, split in (("validation", data.validation), ("test", data.test)):
        table.add_row(name, "none" if split is None else f"{len(split):,} rows")
    if training.objective != "ce" and arguments.teacher is not None:
        teacher = load_class_teacher(run, data, rows)
        places = _sampled(rows.labels)
        start = time.perf_counter()
        answers = compute_class_logits(
            teacher, lambda row: rows.raw(int(places[row])), len(places), training.teacher_batch_size
        )
        seconds = (time.perf_counter() - start) / len(places)
        known = rows.labels[places] != HIDDEN
        right = (answers.argmax(-1).numpy() == rows.labels[places])[known]
        table.add_row("teacher", f"{teacher.kind}; {_accuracy(right)}")
        table.add_row("teacher's pass", f"about {seconds * len(rows) / 60:.1f} minutes, once")
    console.print(table)


def _sampled(labels: Int[np.ndarray, "row"]) -> Int[np.ndarray, "row"]:
    """Rows to judge a teacher by, drawn from all that have a label, or from all where none has: files are often sorted
    by class, so that the first rows would be of one class alone."""
    known = np.flatnonzero(labels != HIDDEN)
    rows = known if len(known) else np.arange(len(labels))
    return np.sort(np.random.default_rng(0).permutation(rows)[:_JUDGED])


def _accuracy(right: Bool[np.ndarray, "row"]) -> str:
    """The share of right answers, with Wilson's 95 % interval, which holds for few rows and near 0 and 1."""
    n = len(right)
    if n == 0:
        return "no row has a label to judge it by"
    share, z = float(right.mean()), 1.96
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return (
        f"{share:.0%} of {n:,} rows drawn at random right (95 % interval {middle - half:.0%} to {middle + half:.0%})"
    )


def class_data_facts(name: str) -> dict[str, Any]:
    """Name, licence, homepage and source of a data recipe of classes."""
    recipe = ClassificationRecipe.load(name)
    return {"name": recipe.name, "license": recipe.license, "homepage": recipe.homepage, "source": recipe.source}


def _config(run: Run) -> DHOConfig:
    config: Any = run.training
    assert isinstance(config, DHOConfig)
    return config


def check_arguments(run: Run) -> None:
    """Raises UserError for keys of tokens, and for a student that cannot be trained."""
    for one in dataclasses.fields(RunArguments):
        if one.name not in _READ and getattr(run.arguments, one.name) != one.default:
            raise UserError(f"Method dho does not read {one.name}; it is about tokens. Remove it.")
    if run.student.use_peft or run.student.load_in_4bit or run.student.load_in_8bit:
        raise UserError("Method dho trains the whole student; remove use_peft, load_in_4bit and load_in_8bit.")
    if run.arguments.student is None or run.arguments.student_init == "prune":
        raise UserError("Set `student` to a vision model, a text model or, with student_init: random, its config.")


def with_unlabeled(data: ClassificationData) -> datasets.Dataset:
    """The rows of train, and those of the unlabelled split after them."""
    if data.unlabeled is None:
        return data.train
    return datasets.concatenate_datasets([data.train, data.unlabeled.cast(data.train.features)])


def student_processor(run: Run, text: bool) -> Any:
    """The image processor or tokenizer of the student. Raises UserError when there is none."""
    auto_class: Any = AutoTokenizer if text else AutoImageProcessor
    hub = {"revision": run.student.model_revision, "trust_remote_code": run.training.trust_remote_code}
    try:
        return auto_class.from_pretrained(run.arguments.student, **hub)
    except (OSError, ValueError) as error:
        kind = "tokenizer" if text else "image processor"
        raise UserError(f"The student {run.arguments.student!r} has no loadable {kind} ({error}).") from error


def new_student(run: Run, data: ClassificationData) -> Any:
    """The dual-head student of a recipe, before training."""
    arguments, training, text = run.arguments, _config(run), data.recipe.text is not None
    assert arguments.student is not None
    cls: Any = DualHeadForSequenceClassification if text else DualHeadForImageClassification
    hub = {"revision": run.student.model_revision, "trust_remote_code": training.trust_remote_code}
    backbone: Any = arguments.student
    loading: dict[str, Any] = {"dtype": run.student.dtype or "float32", **hub}
    if arguments.student_init == "random":
        backbone, loading = AutoConfig.from_pretrained(arguments.student, **hub), {}
    if run.student.attn_implementation is not None and loading:
        loading["attn_implementation"] = run.student.attn_implementation
    if loading:
        config = AutoConfig.from_pretrained(backbone, **hub)
        loading["dtype"] = computed_dtype(loading["dtype"], config, training.device)
    return cls.from_backbone(
        backbone, list(data.class_names), pooling=training.pooling, kd_head=training.kd_head, **loading
    )


def _teacher_logits(run: Run, data: ClassificationData, rows: ClassRows) -> tuple[Any, ClassTeacher | None]:
    """The logits of every training row: from the cache, or computed and written there."""
    arguments = run.arguments
    folder = Path(arguments.teacher_cache or Path(run.training.output_dir or ".") / LOGITS_FOLDER)
    digest = rows_digest(rows.content, len(rows))
    expected: dict[str, Any] = {"class_names": list(data.class_names), "rows": digest}
    if arguments.teacher is None:
        return read_class_logits(folder, expected).logits, None
    teacher = load_class_teacher(run, data, rows)
    name = arguments.teacher
    # open_clip keeps its weights in files of its own; its names are precise.
    weights = None if name.startswith(OPEN_CLIP) else weights_sha256(name, arguments.teacher_revision)
    identity = class_identity(name, weights, teacher, data.class_names, digest)
    training = _config(run)
    # One rank asks, the others read what it wrote.
    with training.main_process_first(desc="teacher logits"):
        if not has_class_logits(folder):
            print(f"Asking the teacher about {len(rows):,} rows, once: {folder}", file=sys.stderr)
            logits = compute_class_logits(teacher, rows.raw, len(rows), training.teacher_batch_size)
            # Recorded, and not compared: the same teacher in another type is the same teacher.
            write_class_logits(folder, ClassLogits(logits, identity | _computed_in(run)))
    return read_class_logits(folder, identity).logits, teacher


def load_class_teacher(run: Run, data: ClassificationData, rows: ClassRows) -> ClassTeacher:
    """The teacher of a recipe, ready to be asked; of kind tip_adapter it learns from the labels shown first."""
    arguments, training = run.arguments, _config(run)
    assert arguments.teacher is not None
    kind, name, text = training.teacher_kind, arguments.teacher, data.recipe.text is not None
    if kind in ("zero_shot", "tip_adapter"):
        if text:
            raise UserError(f"teacher_kind {kind} compares images with prompts; texts need classifier or question.")
        zero_shot = _zero_shot(run, data)
        return zero_shot if kind == "zero_shot" else _tip_adapter(training, zero_shot, data, rows)
    hub = {"revision": arguments.teacher_revision, "trust_remote_code": training.trust_remote_code}
    loading = {"dtype": _teacher_dtype(run), **hub}
    if arguments.teacher_attn_implementation is not None:
        loading["attn_implementation"] = arguments.teacher_attn_implementation
    if kind == "classifier":
        auto_class: Any = AutoModelForSequenceClassification if text else AutoModelForImageClassification
        processor: Any = (AutoTokenizer if text else AutoImageProcessor).from_pretrained(name, **hub)
        classifier = auto_class.from_pretrained(name, **loading)
        return ClassifierTeacher(classifier.to(training.device), processor, data.class_names)
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


def _zero_shot(run: Run, data: ClassificationData) -> ZeroShotTeacher:
    arguments, training = run.arguments, _config(run)
    name = arguments.teacher
    if name is None:
        raise UserError("head_init: text asks the teacher for its text embeddings; set `teacher`.")
    if name.startswith(OPEN_CLIP):
        embedder: Any = OpenClipEmbedder(name, training.device)
    else:
        hub = {"revision": arguments.teacher_revision, "trust_remote_code": training.trust_remote_code}
        embedder = TransformersEmbedder.load(name, dtype=_teacher_dtype(run), **hub)
        embedder.model.to(training.device)
    return ZeroShotTeacher(embedder, data.class_names, data.recipe.prompts, training.normalize_prompt_mean)


def _tip_adapter(
    training: DHOConfig, zero_shot: ZeroShotTeacher, data: ClassificationData, rows: ClassRows
) -> TipAdapterTeacher:
    fewshot = hide_labels(
        rows.labels, data.class_names, training.labels_per_class, training.label_fraction, training.label_seed
    )
    shown = np.flatnonzero(fewshot != HIDDEN)
    return TipAdapterTeacher.fit(
        zero_shot,
        [rows.raw(int(row)) for row in shown],
        fewshot[shown].tolist(),
        alpha=training.tip_alpha,
        beta=training.tip_beta,
        seed=training.label_seed,
    )
