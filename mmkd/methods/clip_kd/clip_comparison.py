"""How dual encoders are compared: by recall among held-out pairs and zero-shot classes, beside CLIP alone."""

from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkd.data.class_rows import ClassRows
from mmkd.data.classification import ClassificationRecipe, load_classification
from mmkd.errors import UserError
from mmkd.models.dual_encoder import DualEncoder, load_dual_encoder
from mmkd.models.dual_features import image_features, recall_of, zero_shot
from mmkd.recipe.recipe import Run
from mmkd.recipe.run import build_trainer
from mmkd.results.compared import ComparedModel, Metric
from mmkd.results.cost import Stopwatch
from mmkd.training.comparison import Comparison, Control
from mmkd.training.log import hours_of_steps

from .clip_config import ContrastiveKDConfig
from .clip_run import load_teacher, pairs_of, settings_of, teacher_runs
from .clip_trainer import ContrastiveKDTrainer
from .ranking_config import RankingConfig

_SHARE = partial(Metric, higher_is_better=True, of_the_model=True)

METRICS = {
    "recall": _SHARE("recall@1, mean of both ways", "recall"),
    "image_to_text_recall@1": _SHARE("image to text recall@1", "image_to_text_recall@1"),
    "text_to_image_recall@1": _SHARE("text to image recall@1", "text_to_image_recall@1"),
    "image_to_text_recall@5": _SHARE("image to text recall@5", "image_to_text_recall@5"),
    "text_to_image_recall@5": _SHARE("text to image recall@5", "text_to_image_recall@5"),
    "zero_shot": _SHARE("zero-shot accuracy", "zero_shot"),
}

Items = list[tuple[float, float]]

_TEACHERS = ("teacher", "teachers", "teacher_cache", "teacher_revision", "teacher_dtype")
_ORDERS = {"ranking": 0.0, "hard_negatives": 0.0}
"""Terms that a key of their own turns on."""
_SCORERS = ("ranking_teacher", "ranking_server", "ranking_server_model")
_OF_RANKING = ("ranking_question", "ranking_min", "ranking_cache")
"""Keys that are refused where `ranking` is none."""


def measure_encoders(run: Run, stage: str, folder: Path) -> ComparedModel:
    """Recall and zero-shot accuracy of the teacher, or of a student that is trained and saved.

    Raises UserError where the data holds no pairs out.
    """
    if stage == "teacher":
        own, name = next(iter((own, name) for name, (own, _) in teacher_runs(run).items()))
        teacher, pairs = load_teacher(own, name), _held_out(pairs_of(run)[1])
        metrics, items, measured_on = _measured(teacher, pairs, settings_of(run))
        return ComparedModel(
            "teacher", str(own.arguments.teacher), teacher.parameter_count, metrics, items, measured_on=measured_on
        )
    training = settings_of(run)
    training.output_dir, training.push_to_hub = str(folder), False
    trainer = build_trainer(run)
    assert isinstance(trainer, ContrastiveKDTrainer)
    pairs = _held_out(trainer.eval_dataset)
    watch = Stopwatch()
    trainer.train()
    cost = watch.cost(trainer.args.world_size)
    trainer.save_model()
    seen = trainer.state.max_steps * trainer.pairs_per_step
    steps = hours_of_steps(folder, trainer.args.world_size)
    cost |= {"tokens_per_second": seen / cost["seconds"], "teacher_tokens": seen if trainer.teachers else 0}
    # As it is saved: a student that inherits is cut in the end.
    student = load_dual_encoder(str(folder), device=training.device)
    metrics, items, measured_on = _measured(student, pairs, training)
    parameters = student.parameter_count
    cost |= {"step_hours": steps}
    return ComparedModel(stage, str(folder), parameters, metrics, items, seen, cost, measured_on=measured_on)


def _held_out(rows: Any) -> Any:
    if rows is None:
        raise UserError(
            "The data holds no pairs out to measure students on. Add a split to the data recipe, "
            "`splits: {eval: ...}`, or set eval_rows in it."
        )
    return rows.split


def _measured(
    encoder: DualEncoder, pairs: Any, config: ContrastiveKDConfig
) -> tuple[dict[str, float], dict[str, Items], str]:
    """Metrics, their items, and what they were measured on in words."""
    hits = {name: _items(values) for name, values in recall_of(encoder, pairs).hits.items()}
    items = {name: hits[name] for name in METRICS if name in hits}
    ways = [items[f"{way}_recall@1"] for way in ("image_to_text", "text_to_image")]
    # Each way counts a half, however many queries it has.
    items["recall"] = [(value / len(way), 1 / len(way)) for way in ways for value, _ in way]
    measured_on = f"{len(pairs):,} held-out pairs"
    if config.zero_shot_data:
        items["zero_shot"] = [each for name in config.zero_shot_data for each in _zero_shot(encoder, name)]
        measured_on += f" and the classes of {' and '.join(config.zero_shot_data)}"
    means = {name: sum(total for total, _ in own) / sum(count for _, count in own) for name, own in items.items()}
    return means, items, measured_on


def _zero_shot(encoder: DualEncoder, name: str) -> Items:
    """Whether each row of a data set's test split gets its class; every data set counts alike."""
    data = load_classification(ClassificationRecipe.load(name))
    part = data.test if data.test is not None else data.validation
    if part is None or data.recipe.image is None:
        raise UserError(
            f"zero_shot_data has {name}, which has no {'pictures' if part is not None else 'test rows'}. Name a data "
            "recipe of classes of pictures with a test or validation split.",
            because="meaning",
        )
    rows = ClassRows(part, None)
    features = image_features(encoder, (rows.raw(row) for row in range(len(rows))))
    told, _ = zero_shot(encoder, features, rows.labels.tolist(), data.class_names, data.recipe.prompts)
    return [(value / len(rows), 1 / len(rows)) for value in told.right.double().tolist()]


def _items(hits: Tensor) -> Items:
    return [(value, 1.0) for value in hits.to(torch.float64).tolist()]


def _clip_alone(recipe: Any, folder: Path) -> dict[str, Any]:
    """The keys of the same student without a teacher's term."""
    own = recipe.keys
    kept = {"student": own.get("student") or own.get("teacher"), "clip_weight": own.get("clip_weight") or 1.0}
    of_teacher = {field.name: field.default for field in fields(RankingConfig)}
    of_teacher |= dict.fromkeys(f"{term}_weight" for term in ContrastiveKDConfig.taught)
    of_teacher |= dict.fromkeys(_TEACHERS)
    return kept | {key: default for key, default in of_teacher.items() if key in own}


def _alone(term: str, weight: float) -> Control:
    """The training with one term of the teacher's."""
    off: dict[str, Any] = {f"{other}_weight": 0.0 for other in ContrastiveKDConfig.taught if other != term}
    off |= {key: "none" for key in _ORDERS if key != term}

    def keys(recipe: Any, folder: Path) -> Sequence[dict[str, Any]]:
        own = recipe.keys
        # What belongs to an order that is off is refused, and so left out too.
        away = {key: None for key in (*_SCORERS, *_OF_RANKING) if term != "ranking" and key in own}
        if term not in _ORDERS:
            return [{**off, **away, f"{term}_weight": own.get(f"{term}_weight") or weight or 1.0}]
        if own.get(term, "none") == "none":
            raise UserError(f"The control {term} trains the recipe's `{term}` alone, and it sets none. Set {term}.")
        return [{**off, **away}]

    return Control(f"{term} alone, beside the recipe's clip_weight", keys)


COMPARISON = Comparison(
    baseline_method=None,
    baseline=_clip_alone,
    baseline_name="CLIP alone",
    controls={term: _alone(term, weight) for term, weight in {**ContrastiveKDConfig.taught, **_ORDERS}.items()},
    items="pairs",
    metrics=METRICS,
    measure=measure_encoders,
    timed=True,
)
