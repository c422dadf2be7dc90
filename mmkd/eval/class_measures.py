"""`mmkd eval` of dual-head classifiers: accuracy on held-out rows, and through texts on classes never seen."""

import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from mmkd import __version__
from mmkd.cache.identity import weights_sha256
from mmkd.data.class_rows import ClassCollator, ClassRows
from mmkd.data.classification import ClassificationData, ClassificationRecipe, load_classification
from mmkd.errors import UserError
from mmkd.losses.open_vocabulary import text_logits
from mmkd.losses.retrieval import ClassAccuracy
from mmkd.models.class_prompts import load_prompts
from mmkd.models.dual_head import DualHeadConfig
from mmkd.results.machine import machine
from mmkd.results.scores import scores_of
from mmkd.teachers.classifiers import OPEN_CLIP, OpenClipEmbedder, TransformersEmbedder, ZeroShotTeacher

from .harness import Settings, device_of
from .model import EvalModel, find_model
from .results import Results, key_of

CLASSES = "classes"
"""The measure of classifiers."""

_ROWS = 64


@dataclass(frozen=True)
class ClassifierModel(EvalModel):
    """A dual-head classifier."""

    @cached_property
    def weights(self) -> str:
        """sha256 of its weights."""
        return weights_sha256(self.path, self.revision)


@dataclass(frozen=True)
class ClassesToMeasure:
    """What a classifier is measured on, and whose texts name the classes."""

    data: str
    teacher: str | None = None
    """A CLIP-like model, for a student with embeddings."""
    rows: int | None = None
    prompts: str | None = None
    """A set of prompts or a file; by default those of the data recipe."""

    @cached_property
    def classes(self) -> ClassificationData:
        """The rows."""
        return load_classification(ClassificationRecipe.load(self.data), max_eval_rows=self.rows)

    @cached_property
    def measured(self) -> Any:
        """The test rows, or else those of validation. Raises UserError where there is neither."""
        rows = self.classes.validation if self.classes.test is None else self.classes.test
        if rows is None:
            raise UserError(
                f"{self.data} has neither test nor validation rows to measure on. Add a split to the data recipe: "
                "`splits: {test: ...}`, or validation_per_class."
            )
        return rows

    def unseen(self, known: Sequence[str]) -> tuple[Any, list[str]]:
        """The rows of classes that a student does not know, each with the `name` of its class, and these names.

        Those of the unseen split, or else measured rows of the data's own classes.
        """
        data = self.classes
        rows, names = (self.measured, data.class_names) if data.unseen is None else (data.unseen, data.unseen_names)
        labels = [names[label] for label in rows["label"]]
        chosen = [row for row, label in enumerate(labels) if label not in known]
        column = [labels[row] for row in chosen]
        return rows.select(chosen).add_column("name", column), [name for name in names if name not in known]

    @property
    def templates(self) -> tuple[str, ...]:
        """The prompts of classes."""
        return self.classes.recipe.prompts if self.prompts is None else tuple(load_prompts(self.prompts))


def find_classifier(name: str, **hub: Any) -> ClassifierModel | None:
    """The dual-head classifier of a run's folder or of another; None for a model of another kind."""
    model = find_model(name, **hub)
    if model.adapter or model.members:
        return None
    try:
        config = AutoConfig.from_pretrained(model.path, **model.hub)
    except (OSError, ValueError):
        # What is wrong with it is said where it is loaded.
        return None
    if not isinstance(config, DualHeadConfig):
        return None
    return ClassifierModel(**{field.name: getattr(model, field.name) for field in fields(EvalModel)})


def measure_classifier(
    model: ClassifierModel, on: ClassesToMeasure, settings: Settings, output: Any = None
) -> list[dict[str, Any]]:
    """The entry of a classifier's accuracy, from its results where it is known.

    Raises UserError for data without a row of its classes.
    """
    results = Results.of(model, output)
    conditions = {"device": device_of(settings), "data": on.data, "rows": on.rows, "teacher": on.teacher}
    conditions |= {"prompts": list(on.templates), "digest": _digest(on)}
    key = key_of("classifier", __version__, CLASSES, conditions)
    entry = results.task(key)
    if entry is None:
        name = on.classes.recipe.name
        print(f"{model.name}: {CLASSES} on {name}", file=sys.stderr)
        begun = time.monotonic()
        numbers, count, samples = _measured(model, on, device_of(settings), f"{name} {CLASSES}")
        task, metrics = (
            f"{name} {CLASSES}",
            [metric.partition(",")[0] for metric in numbers if "_stderr" not in metric],
        )
        facts = {"task": task, "harness": "mmkd", "harness_version": __version__, "metric": metrics}
        facts |= {"results": {task: numbers}, "groups": {}, "settings": conditions, "machine": machine()}
        facts |= {"n_samples": {task: {"original": count, "effective": count}}}
        facts |= {"higher_is_better": {task: dict.fromkeys(metrics, True)}, "seconds": time.monotonic() - begun}
        facts |= {"date": datetime.now(UTC).isoformat("T", "seconds")}
        entry = results.add_task(key, {**facts, "scores": scores_of(facts)}, samples)
    return [{**entry, "samples": str(results.folder / entry["samples"])}]


def _measured(
    model: ClassifierModel, on: ClassesToMeasure, device: str, task: str
) -> tuple[dict[str, float], int, list[dict[str, Any]]]:
    """Numbers in the form of lm-eval's, how many rows they are of, and a sample of each."""
    student, rows = _Student(model, on.measured, device), on.measured
    labels = [on.classes.class_names[label] for label in rows["label"]]
    known = np.flatnonzero([label in student.names for label in labels])
    if len(known) == 0:
        raise UserError(
            f"{on.data} has no row of a class that {model.name} knows ({', '.join(student.names[:3])}, ...).",
            because="meaning",
        )
    truth = torch.tensor([student.names.index(labels[row]) for row in known])
    logits, embeds = student.answers(known.tolist())
    told = ClassAccuracy(logits.argmax(-1) == truth, truth)
    spread = told.right.double().std().item() / len(known) ** 0.5 if len(known) > 1 else 0.0
    numbers = {"acc,none": told.accuracy, "acc_stderr,none": spread, "mean_per_class_acc,none": told.mean_per_class}
    samples = [
        {
            "task": task,
            "doc_id": int(row),
            "target": student.names[right],
            "response": student.names[said],
            "metrics": {"acc": float(right == said)},
        }
        for row, right, said in zip(known, truth.tolist(), logits.argmax(-1).tolist(), strict=True)
    ]
    if embeds is not None and on.teacher is not None:
        numbers["seen_classes_acc,none"] = _through_texts(on, model, student.names, embeds, truth, device)
        others, names = on.unseen(student.names)
        if len(others):
            own = torch.tensor([names.index(name) for name in others["name"]])
            embedded = _Student(model, others, device).answers(range(len(others)))[1]
            assert embedded is not None
            numbers["unseen_classes_acc,none"] = _through_texts(on, model, names, embedded, own, device)
    return numbers, len(known), samples


def _through_texts(
    on: ClassesToMeasure, model: EvalModel, names: Sequence[str], embeds: Tensor, labels: Tensor, device: str
) -> float:
    """The mean accuracy per class of the teacher's texts that are nearest to embeddings."""
    name = str(on.teacher)
    if name.startswith(OPEN_CLIP):
        embedder: Any = OpenClipEmbedder(name, device)
    else:
        embedder = TransformersEmbedder.load(name, trust_remote_code=model.trust_remote_code)
        embedder.model.to(device)
    text = ZeroShotTeacher(embedder, names, on.templates).text_weights
    if text.shape[1] != embeds.shape[1]:
        raise UserError(
            f"{model.name} has embeddings of {embeds.shape[1]} numbers and the texts of {name} {text.shape[1]}. Name "
            "the teacher that it learnt from with --teacher.",
            because="meaning",
        )
    return ClassAccuracy(text_logits(embeds, text).argmax(-1) == labels, labels).mean_per_class


class _Student:
    """A classifier, and the rows that it is asked about."""

    def __init__(self, model: ClassifierModel, dataset: Any, device: str) -> None:
        text = "text" in dataset.column_names
        auto_class: Any = AutoModelForSequenceClassification if text else AutoModelForImageClassification
        processor: Any = AutoTokenizer if text else AutoImageProcessor
        self.model = auto_class.from_pretrained(model.path, use_safetensors=True, **model.hub).eval().to(device)
        self.names = list(self.model.config.id2label.values())
        processing_class = processor.from_pretrained(model.path, **model.hub)
        self.rows, self.collate = ClassRows(dataset, processing_class, name="test"), ClassCollator(processing_class)

    @torch.no_grad()
    def answers(self, places: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """The joined prediction of rows, and their embeddings where the student has any."""
        logits, embeds = [], []
        for first in range(0, len(places), _ROWS):
            batch = self.collate([self.rows[place] for place in places[first : first + _ROWS]])
            inputs = {name: values.to(self.model.device) for name, values in batch.items() if name != "labels"}
            said = self.model(**inputs)
            logits.append(said.logits.cpu())
            embeds += [] if said.embeds is None else [said.embeds.float().cpu()]
        return torch.cat(logits), torch.cat(embeds) if embeds else None


def _digest(on: ClassesToMeasure) -> str:
    """Of the contents and the classes of the measured rows."""
    rows = ClassRows(on.measured, None)
    digest = hashlib.sha256(rows.labels.tobytes())
    for row in range(len(rows)):
        digest.update(rows.content(row))
    return digest.hexdigest()
