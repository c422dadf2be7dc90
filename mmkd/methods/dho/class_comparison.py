"""How students of classes are compared: by accuracy on rows that choose nothing, beside one of labels alone."""

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmkd.data.class_rows import ClassRows
from mmkd.data.classification import HIDDEN, hide_labels
from mmkd.errors import UserError
from mmkd.losses.dual_head_losses import interpolate, search_interpolation
from mmkd.recipe.recipe import Run
from mmkd.recipe.run import build_trainer
from mmkd.results.compared import ComparedModel, Metric
from mmkd.results.cost import Stopwatch
from mmkd.teachers.class_logits import compute_class_logits
from mmkd.teachers.classifiers import ClassTeacher, TipAdapterTeacher, ZeroShotTeacher
from mmkd.training.comparison import Comparison, Control
from mmkd.training.log import LOG

from .class_run import load_classes, settings_of
from .class_teacher import LOGITS_FOLDER, load_class_teacher, runs_of_teachers
from .class_terms_config import TERMS
from .conflict_plot import plot_conflict
from .dho_trainer import DHOTrainer

Answers = tuple[Float[Tensor, "row class"], Float[Tensor, "row class"], Int[Tensor, "row"]]
"""Logits of the supervised and of the distillation head, and labels."""

FEW = 4
"""Validation rows of each class by which choices are made a second time: they are labels, too."""

LAMBDAS = (0.25, 0.5, 0.75)
"""Weights of the supervised loss that the control with one head is trained with."""

METRICS = {
    "accuracy": Metric("accuracy", "accuracy", higher_is_better=True, of_the_model=True, chosen_by="validation"),
    "validation": Metric("validation accuracy", higher_is_better=True, chosen_by="validation"),
    "accuracy_few": Metric(
        f"accuracy, chosen by {FEW} rows per class", higher_is_better=True, chosen_by="validation_few"
    ),
    "accuracy_fixed": Metric("accuracy, nothing chosen", higher_is_better=True),
    "ce_head_accuracy": Metric("supervised head alone", higher_is_better=True),
    "kd_head_accuracy": Metric("distillation head alone", higher_is_better=True),
    "alpha": Metric("alpha"),
    "beta": Metric("beta"),
    "gradient_cosine": Metric("cosine of the gradients"),
    "seen_class_accuracy": Metric("trained classes through texts, mean of classes", higher_is_better=True),
    "unseen_class_accuracy": Metric("classes never seen through texts, mean of classes", higher_is_better=True),
}


def measure_classes(run: Run, stage: str, folder: Path) -> ComparedModel:
    """The accuracy of the teacher, or of a student that is trained and saved, on the test rows.

    On the validation rows where the data has no test split. Raises UserError where it has neither.
    """
    if stage == "teacher":
        return _measure_teacher(run)
    training = settings_of(run)
    training.output_dir, training.push_to_hub = str(folder), False
    trainer = build_trainer(_with_shared_logits(run, folder.parent))
    assert isinstance(trainer, DHOTrainer)
    rows, split = _measured_rows(trainer.test_dataset, trainer.eval_dataset)
    watch = Stopwatch()
    trainer.train()
    cost = watch.cost()
    trainer.save_model()
    answers, validation = _answers(trainer, rows), _answers(trainer, trainer.eval_dataset)
    metrics = _metrics(trainer, answers, validation, training.label_seed)
    alpha, beta = trainer.model.config.alpha, trainer.model.config.beta
    right = _right(answers, alpha, beta)
    labelled = trainer.state.max_steps * training.train_batch_size * training.gradient_accumulation_steps
    asked = len(trainer.train_dataset) if training.asks_teacher else 0
    cost |= {"tokens_per_second": labelled / cost["seconds"], "teacher_tokens": asked}
    metrics = {"accuracy": statistics.fmean(right), **metrics, **_through_texts(trainer, rows)}
    items = {"accuracy": [(value, 1.0) for value in right]}
    parameters = trainer.model.num_parameters()
    return ComparedModel(stage, str(folder), parameters, metrics, items, labelled, cost, measured_on=split)


def _through_texts(trainer: DHOTrainer, rows: Any) -> dict[str, float]:
    """How classes are recognised by the teacher's texts of them, where the student has an embedding."""
    if not trainer.args.term_weights:
        return {}
    metrics = {"seen_class_accuracy": trainer.seen_accuracy(rows)}
    return metrics | ({} if trainer.unseen is None else {"unseen_class_accuracy": trainer.unseen_accuracy()})


def _with_shared_logits(run: Run, folder: Path) -> Run:
    """The run with its teacher's logits where all trainings of a comparison find them.

    Not those of Tip-Adapter, which differ with the labels that are shown.
    """
    arguments, training = run.arguments, settings_of(run)
    kind, unseen = training.teacher_kind, training.unseen_classes
    # Of a recipe without unseen classes, the name that earlier versions gave.
    made_of = [arguments.teacher, kind, arguments.data, *([] if unseen is None else [unseen])]
    name = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:8]
    if training.aspects is not None and training.aspects_cache is None:
        training.aspects_cache = str(folder / f"aspects-{name}")
    if arguments.teacher_cache is not None or arguments.teachers is not None or kind == "tip_adapter":
        return run
    return replace(run, arguments=replace(arguments, teacher_cache=str(folder / f"{LOGITS_FOLDER}-{name}")))


def _measure_teacher(run: Run) -> ComparedModel:
    classes = load_classes(run)
    data = classes.data
    splits = (None if part is None else ClassRows(part, None) for part in (data.test, data.validation))
    rows, split = _measured_rows(*splits)
    # Of several, the first one.
    run = next(iter(runs_of_teachers(run).values()))
    teacher = load_class_teacher(run, classes)
    logits = compute_class_logits(teacher, rows.raw, len(rows), settings_of(run).teacher_batch_size)
    right = (logits.argmax(-1) == torch.as_tensor(rows.labels)).double().tolist()
    items = {"accuracy": [(value, 1.0) for value in right]}
    metrics = {"accuracy": statistics.fmean(right)}
    name, parameters = str(run.arguments.teacher), _parameters(teacher)
    return ComparedModel("teacher", name, parameters, metrics, items, measured_on=split)


def _measured_rows(test: ClassRows | None, validation: ClassRows | None) -> tuple[ClassRows, str]:
    """The rows that are measured, and which those are in words."""
    rows, split = (validation, "validation") if test is None else (test, "test")
    if rows is None:
        raise UserError(
            "The data has neither test nor validation rows to measure students on. Add a split to the data recipe: "
            "`splits: {test: ...}`, or validation_per_class."
        )
    return rows, f"{len(rows):,} {split} rows"


def _parameters(teacher: ClassTeacher) -> int:
    if isinstance(teacher, TipAdapterTeacher):
        teacher = teacher.zero_shot
    holder: Any = teacher.embedder if isinstance(teacher, ZeroShotTeacher) else teacher
    return sum(parameter.numel() for parameter in holder.model.parameters())


def _metrics(trainer: DHOTrainer, test: Answers, validation: Answers | None, seed: int) -> dict[str, float]:
    """What is told beside the accuracy: the same with other choices, and of each head."""
    args, config = trainer.args, trainer.model.config
    metrics: dict[str, float] = {}
    few = None
    if validation is not None:
        metrics["validation"] = _accuracy(validation, config.alpha, config.beta)
        labels = validation[2].numpy()
        if np.bincount(labels, minlength=len(trainer.class_names)).min() >= FEW:
            shown = hide_labels(labels, trainer.class_names, FEW, None, seed) != HIDDEN
            few = tuple(values[torch.as_tensor(shown)] for values in validation)
            metrics["validation_few"] = _accuracy(few, config.alpha, config.beta)
    fixed = (0.5, 0.5) if args.objective == "dho" else (config.alpha, config.beta)
    metrics["accuracy_fixed"] = _accuracy(test, *fixed)
    if few is not None:
        ce, kd, labels = few
        choice = search_interpolation(ce, kd, labels, args.alphas, args.betas) if args.objective == "dho" else config
        metrics["accuracy_few"] = _accuracy(test, choice.alpha, choice.beta)
    if args.objective == "dho":
        metrics |= {"ce_head_accuracy": _accuracy(test, 1, 1), "kd_head_accuracy": _accuracy(test, 0, 1)}
        metrics |= {"alpha": config.alpha, "beta": config.beta}
    cosines = [entry["gradient_cosine"] for entry in trainer.state.log_history if "gradient_cosine" in entry]
    return metrics | ({"gradient_cosine": statistics.fmean(cosines)} if cosines else {})


def _answers(trainer: DHOTrainer, rows: Any) -> Any:
    if rows is None:
        return None
    output = trainer.predict(rows)
    ce, kd = (torch.as_tensor(logits) for logits in output.predictions[:2])
    return ce, kd, torch.as_tensor(output.label_ids)


def _right(answers: Answers, alpha: float, beta: float) -> list[float]:
    ce, kd, labels = answers
    return (interpolate(ce, kd, alpha, beta).argmax(-1) == labels).double().tolist()


def _accuracy(answers: Any, alpha: float, beta: float) -> float:
    return statistics.fmean(_right(answers, alpha, beta))


def _plot(runs: Mapping[str, Sequence[Path]], output: Path) -> Path | None:
    """How the two losses pull on the features, of the trainings that learn from both."""
    logs = {f"{name}#{seed}": _log(folder) for name, folders in runs.items() for seed, folder in enumerate(folders)}
    drawn = {name: log for name, log in logs.items() if any("gradient_cosine" in entry for entry in log)}
    if not drawn:
        return None
    plot_conflict(drawn, output / "gradient_conflict.png")
    return output / "gradient_conflict.png"


def _log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]


def _single_head(recipe: Any, folder: Path) -> list[dict[str, Any]]:
    return [{**_kd_loss(recipe), "objective": "single_head", "ce_weight": weight} for weight in LAMBDAS]


def _logits_only(recipe: Any, folder: Path) -> list[dict[str, Any]]:
    # Classes that are never seen are recognised by what further terms teach.
    off = {} if recipe.keys.get("unseen_classes") else _without_terms(recipe)
    return [{**off, **_kd_loss(recipe), "objective": "kd"}]


def _labels_only(recipe: Any, folder: Path) -> dict[str, Any]:
    """Labels, and where classes are never seen, labels through texts, without which nothing would know them."""
    texts = {"text_ce_weight": 1.0} if recipe.keys.get("unseen_classes") else {}
    return {**_without_terms(recipe), **texts, "objective": "ce"}


def _without_terms(recipe: Any) -> dict[str, Any]:
    """What takes further terms out of the loss, as far as the recipe has any."""
    named = [f"{term}_weight" for term in TERMS if f"{term}_weight" in recipe.keys]
    return dict.fromkeys(named, 0.0) | ({"aspects": None} if "aspects" in recipe.keys else {})


def _kd_loss(recipe: Any) -> dict[str, str]:
    """The loss on the teacher's logits that the recipe's objective stands for."""
    objective = recipe.keys.get("objective")
    return {"kd_loss": objective} if objective in ("ofa", "pld") else {}


COMPARISON = Comparison(
    baseline_method=None,
    baseline=_labels_only,
    baseline_name="labels only",
    # Which labels are shown differs between seeds, as the weights do.
    seeds=("seed", "label_seed"),
    controls={
        "kd": Control("the teacher's logits alone, without any label", _logits_only),
        "single_head": Control(
            f"one head with both losses, its ce_weight chosen of {', '.join(map(str, LAMBDAS))} by validation rows",
            _single_head,
            usual=LAMBDAS.index(0.5),
        ),
    },
    items="rows",
    metrics=METRICS,
    measure=measure_classes,
    plot=_plot,
)
