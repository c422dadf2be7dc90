"""Measures of dual encoders: recall, zero-shot classification and a linear probe, kept per model like benchmarks."""

import hashlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mmkd import __version__
from mmkd.data.caption_source import CaptionedSplit, load_captions
from mmkd.data.class_rows import ClassRows
from mmkd.data.classification import ClassificationData, ClassificationRecipe, load_classification
from mmkd.data.picture_source import recipe_of
from mmkd.data.text_pairs import TextPairSplit, load_text_pairs
from mmkd.errors import UserError
from mmkd.losses.retrieval import ClassAccuracy
from mmkd.models.class_prompts import load_prompts
from mmkd.models.dual_encoder import DualEncoder, load_dual_encoder
from mmkd.models.dual_features import RECALLS, image_features, probed, recall_of, zero_shot
from mmkd.results.machine import machine
from mmkd.results.scores import scores_of

from .encoder_model import EncoderModel
from .harness import Settings, device_of
from .results import Results, key_of

RECALL, ZERO_SHOT, LINEAR_PROBE = "recall", "zero_shot", "linear_probe"
ENCODER_MEASURES = (RECALL, ZERO_SHOT, LINEAR_PROBE)
"""What `--measures` takes of dual encoders; the last two need data of classes."""


@dataclass(frozen=True)
class EncoderData:
    """What a dual encoder is measured on."""

    data: str
    """A data recipe of captions, of pairs of texts, or of classes."""
    rows: int | None = None
    """At most so many held-out rows; by default all."""
    prompts: str | None = None
    """A set of prompts or a file; by default those of the data recipe."""
    unseen: tuple[str, ...] = ()
    """Classes that the model has not learnt, which are told apart from the others."""

    @cached_property
    def is_classes(self) -> bool:
        """Whether the rows have classes."""
        return isinstance(recipe_of(self.data), ClassificationRecipe)

    @cached_property
    def name(self) -> str:
        """The name of the data."""
        return recipe_of(self.data).name

    @cached_property
    def classes(self) -> ClassificationData:
        """The rows of classes. Raises UserError for rows without pictures."""
        data = load_classification(ClassificationRecipe.load(self.data), max_eval_rows=self.rows)
        if data.recipe.image is None:
            raise UserError(
                f"{self.data}: these rows are texts, and zero-shot classification and the linear probe read images.",
                because="not built",
            )
        strange = [name for name in self.unseen if name not in data.class_names]
        if strange:
            raise UserError(f"--unseen_classes has {strange[0]!r}; the classes are {', '.join(data.class_names)}.")
        return data

    @cached_property
    def measured(self) -> ClassRows:
        """The test rows of classes, or else those of validation. Raises UserError where there is neither."""
        rows = self.classes.test if self.classes.test is not None else self.classes.validation
        if rows is None:
            raise UserError(
                f"{self.data} has neither test nor validation rows to measure on. Add a split to the data recipe: "
                "`splits: {test: ...}`, or validation_per_class."
            )
        return ClassRows(rows, None)

    def pairs(self, images: bool) -> CaptionedSplit | TextPairSplit:
        """The held-out pairs, of images and captions or of texts. Raises UserError where nothing is held out."""
        load: Any = load_captions if images else load_text_pairs
        held_out = load(self.data, max_eval_rows=self.rows).held_out
        if held_out is None:
            raise UserError(f"{self.data} holds nothing out, so there is nothing fair to measure on.")
        return held_out

    @property
    def templates(self) -> tuple[str, ...]:
        """The prompts of classes."""
        return self.classes.recipe.prompts if self.prompts is None else load_prompts(self.prompts)


def measure_encoder(
    model: EncoderModel, names: Sequence[str], on: EncoderData, settings: Settings, output: Any = None
) -> list[dict[str, Any]]:
    """The entries of measures, from the model's results where they are known.

    Without `names`, those that the data allows. Raises UserError for measures that the data has no rows for.
    """
    names = _chosen(model, names, on)
    results, measuring = Results.of(model, output), _Measuring(model, on, settings)
    entries = []
    for name in names:
        key = key_of("encoder", __version__, name, measuring.conditions(name))
        entry = results.task(key)
        if entry is None:
            print(f"{model.name}: {name} on {on.name}", file=sys.stderr)
            begun = time.monotonic()
            facts, samples = getattr(measuring, name)()
            facts |= {"task": next(iter(facts["results"])), "harness": "mmkd", "harness_version": __version__}
            if len(facts["results"]) > 1:
                facts["task"] = f"{name}_{on.name}"
            facts |= {"groups": {}, "settings": measuring.conditions(name), "machine": machine()}
            facts |= {"seconds": time.monotonic() - begun, "date": datetime.now(UTC).isoformat("T", "seconds")}
            entry = results.add_task(key, {**facts, "scores": scores_of(facts)}, samples)
        entries.append({**entry, "samples": str(results.folder / entry["samples"])})
    return entries


def _chosen(model: EncoderModel, names: Sequence[str], on: EncoderData) -> list[str]:
    of_classes = [ZERO_SHOT, LINEAR_PROBE]
    if not names:
        names = of_classes if on.is_classes else [RECALL]
    if not model.has_images and set(names) & {*of_classes}:
        raise UserError(
            f"{model.name} is an encoder of sentences, and {' and '.join(of_classes)} are about images. Measure "
            "recall on pairs of texts.",
            because="meaning",
        )
    for name in names:
        if name not in ENCODER_MEASURES:
            raise UserError(
                f"{model.name} is a dual encoder, which has no measure {name!r}; it has "
                f"{', '.join(ENCODER_MEASURES)}.",
                because="meaning",
            )
        if (name in of_classes) != on.is_classes:
            needs = "classes: a recipe under data_recipes/classification/" if name in of_classes else "captions"
            raise UserError(f"Measure {name} needs rows with {needs}; {on.data} has others.", because="meaning")
    return [name for name in ENCODER_MEASURES if name in names]


class _Measuring:
    """Takes measures; each is a method that gives results in the form of lm-eval's, and the samples."""

    def __init__(self, model: EncoderModel, on: EncoderData, settings: Settings) -> None:
        self.model, self.on, self.settings = model, on, settings

    def conditions(self, name: str) -> dict[str, Any]:
        """What decides a result besides the weights."""
        on = self.on
        facts = {"dtype": self._dtype, "device": device_of(self.settings), "data": on.data, "rows": on.rows}
        if name == ZERO_SHOT:
            facts |= {"prompts": list(on.templates), "unseen": list(on.unseen), "classes": on.classes.class_names}
        elif name == LINEAR_PROBE:
            data = on.classes
            parts = [part for part in (data.train, data.validation) if part is not None]
            facts["learnt"] = [_digest_of(ClassRows(part, None)) for part in parts]
        return facts | {"digest": self._digest}

    @property
    def _dtype(self) -> str:
        return "float32" if self.settings.dtype == "auto" else self.settings.dtype

    @cached_property
    def _digest(self) -> str:
        """Of the rows."""
        if self.on.is_classes:
            return _digest_of(self.on.measured)
        pairs = self._pairs
        firsts = pairs.firsts if isinstance(pairs, TextPairSplit) else pairs.pictures.identities
        return key_of(firsts, pairs.captions)

    @cached_property
    def encoder(self) -> DualEncoder:
        """The loaded model."""
        return load_dual_encoder(self.model.path, dtype=self._dtype, device=device_of(self.settings), **self.model.hub)

    @cached_property
    def _pairs(self) -> CaptionedSplit | TextPairSplit:
        return self.on.pairs(self.model.has_images)

    @cached_property
    def _tested(self) -> Tensor:
        """Features of the measured images of classes."""
        return self._of_images(self.on.measured)

    def _of_images(self, rows: ClassRows) -> Tensor:
        return image_features(self.encoder, (rows.raw(row) for row in range(len(rows))))

    def recall(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Recall both ways among the held-out pairs."""
        pairs = self._pairs
        found = recall_of(self.encoder, pairs)
        texts = list(dict.fromkeys(text for own in pairs.captions for text in own))
        results, samples = {}, []
        for side, ranks, prompts in (
            ("image_to_text", found.image_to_text, [" | ".join(own) for own in pairs.captions]),
            ("text_to_image", found.text_to_image, texts),
        ):
            task = f"{self.on.name} {side}"
            hits = {f"recall@{count}": (ranks < count).double() for count in RECALLS}
            results[task] = _numbers(hits)
            for number, prompt in enumerate(prompts):
                own = {name: values[number].item() for name, values in hits.items()}
                rank = int(ranks[number])
                samples.append(_sample(task, number, prompt, f"rank {rank + 1}", own))
        counts = (len(found.image_to_text), len(found.text_to_image))
        return _facts(results, [f"recall@{count}" for count in RECALLS], counts), samples

    def zero_shot(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The share of images that are nearest to the text of their class."""
        on = self.on
        rows, names = on.measured, on.classes.class_names
        told, predictions = zero_shot(self.encoder, self._tested, rows.labels.tolist(), names, on.templates)
        task = f"{on.name} zero_shot"
        numbers = _numbers({"acc": told.right.double()}) | {"mean_per_class_acc,none": told.mean_per_class}
        metrics = ["acc", "mean_per_class_acc"]
        if on.unseen:
            parts = _parts(told, names, on.unseen)
            numbers |= {f"{name},none": part.mean_per_class for name, part in parts.items() if len(part.labels)}
            metrics += [name for name, part in parts.items() if len(part.labels)]
        samples = [
            _sample(task, row, names[truth], names[predicted], {"acc": float(truth == predicted)})
            for row, (truth, predicted) in enumerate(zip(told.labels.tolist(), predictions.tolist(), strict=True))
        ]
        return _facts({task: numbers}, metrics, [len(rows)]), samples

    def linear_probe(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The accuracy of a logistic regression on the image features of the training rows."""
        on, data = self.on, self.on.classes
        if data.validation is None or data.test is None:
            raise UserError(
                f"{on.data}: a linear probe is chosen on validation rows and measured on test rows, and the data has "
                f"no {'validation' if data.validation is None else 'test'} split. Add it under splits, or set "
                "validation_per_class.",
                because="meaning",
            )
        train, validation = ClassRows(data.train, None), ClassRows(data.validation, None)
        sides = [(self._of_images(rows), rows.labels.tolist()) for rows in (train, validation)]
        answer = probed(sides[0], sides[1], self._tested)
        labels, task = on.measured.labels, f"{on.name} linear_probe"
        right = torch.as_tensor(answer.predictions == labels).double()
        numbers = _numbers({"acc": right})
        samples = [
            _sample(
                task, row, data.class_names[truth], data.class_names[predicted], {"acc": float(truth == predicted)}
            )
            for row, (truth, predicted) in enumerate(zip(labels.tolist(), answer.predictions.tolist(), strict=True))
        ]
        facts = _facts({task: numbers}, ["acc"], [len(labels)])
        chosen = {"C": answer.strength, "validation_accuracy": answer.validation_accuracy, "train_rows": len(train)}
        return {**facts, "chosen": chosen}, samples


def _digest_of(rows: ClassRows) -> str:
    """Of the contents and the classes of rows."""
    digest = hashlib.sha256(rows.labels.tobytes())
    for row in range(len(rows)):
        digest.update(rows.content(row))
    return digest.hexdigest()


def _parts(told: ClassAccuracy, names: Sequence[str], unseen: Sequence[str]) -> dict[str, ClassAccuracy]:
    """The accuracy on rows of classes that were learnt, and on those that were not, among all classes."""
    new = [names.index(name) for name in unseen]
    return {
        "seen_classes_acc": told.of_classes([number for number in range(len(names)) if number not in new]),
        "unseen_classes_acc": told.of_classes(new),
    }


def _numbers(hits: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean of each with its standard error."""
    numbers = {}
    for name, values in hits.items():
        spread = values.std().item() / len(values) ** 0.5 if len(values) > 1 else 0.0
        numbers |= {f"{name},none": values.mean().item(), f"{name}_stderr,none": spread}
    return numbers


def _facts(results: Mapping[str, Any], metrics: list[str], counts: Sequence[int]) -> dict[str, Any]:
    rows = {task: {"original": count, "effective": count} for task, count in zip(results, counts, strict=True)}
    higher = {task: dict.fromkeys(metrics, True) for task in results}
    return {"results": dict(results), "metric": metrics, "n_samples": rows, "higher_is_better": higher}


def _sample(task: str, number: int, target: str, response: str, metrics: Mapping[str, float]) -> dict[str, Any]:
    return {"task": task, "doc_id": number, "target": target, "response": response, "metrics": dict(metrics)}
