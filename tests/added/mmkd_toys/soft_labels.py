"""A predictor of classes: an image classifier that learns a zero-shot teacher's answers, and no labels."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from torch.nn.functional import kl_div
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, TrainingArguments

from mmkd.data.class_rows import ClassCollator, ClassRows
from mmkd.data.classification import ClassificationRecipe, load_classification
from mmkd.preflight.book import Book
from mmkd.preflight.facts import Finding
from mmkd.preflight.hardware import Device
from mmkd.preflight.stage_checks import StageRun
from mmkd.recipe.recipe import Run
from mmkd.teachers.class_logits import compute_class_logits
from mmkd.teachers.classifiers import TransformersEmbedder, ZeroShotTeacher
from mmkd.training.method import Method
from mmkd.training.run_trainer import RunTrainer


@dataclass
class SoftLabelsConfig(TrainingArguments):
    """Settings of method soft_labels."""

    softness: float = field(default=2.0, metadata={"help": "Temperature of teacher and student in the loss."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with models on the Hub."})

    def __post_init__(self) -> None:
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self.remove_unused_columns = False
        super().__post_init__()


class SoftLabelsTrainer(RunTrainer):
    """transformers' Trainer of a classifier, with the teacher's logits in every batch."""

    method = "soft_labels"
    config_class = SoftLabelsConfig

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """The KL from the teacher's softened answers to the student's."""
        softness = self.args.softness  # pyright: ignore[reportAttributeAccessIssue]
        outputs = model(pixel_values=inputs["pixel_values"])
        ours, theirs = ((logits / softness).log_softmax(-1) for logits in (outputs.logits, inputs["teacher_logits"]))
        loss = kl_div(ours, theirs, log_target=True, reduction="batchmean")
        return (loss, outputs) if return_outputs else loss


def build(run: Run) -> SoftLabelsTrainer:
    """The trainer of a recipe, its teacher asked about every row."""
    rows, names, prompts = read(run)
    teacher = ZeroShotTeacher(TransformersEmbedder.load(str(run.arguments.teacher)), names, prompts)
    logits = compute_class_logits(teacher, rows.raw, len(rows))
    return SoftLabelsTrainer(
        model=student(run, names),
        args=run.training,
        data_collator=ClassCollator(rows.processing_class, logits),
        train_dataset=rows,
        processing_class=rows.processing_class,
    )


def read(run: Run) -> tuple[ClassRows, list[str], list[str]]:
    """The rows, the names of the classes and the prompts of a recipe."""
    data = load_classification(
        ClassificationRecipe.load(run.arguments.data), max_train_rows=run.arguments.max_train_rows
    )
    processor: Any = AutoImageProcessor.from_pretrained(str(run.arguments.student))
    return ClassRows(data.train, processor), list(data.class_names), list(data.recipe.prompts)


def student(run: Run, names: Sequence[str]) -> Any:
    """A classifier with fresh weights."""
    config: Any = AutoConfig.from_pretrained(str(run.arguments.student))
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    return AutoModelForImageClassification.from_config(config)


def dry_run(run: Run, console: Console) -> None:
    """Prints how many rows of how many classes there are."""
    rows, names, _ = read(run)
    console.print(f"{len(rows)} rows of {len(names)} classes")


def check(run: Run) -> None:
    """Raises UserError for data that training would refuse."""
    read(run)


def examine(run: Run, sharded: bool) -> list[Finding]:
    """Whether the data can be read."""
    book = Book()
    found = book.attempt("data", read, run)
    rows = [] if found is None else [Finding("ok", "data", f"{len(found[0])} rows of {len(found[1])} classes.")]
    return [*book.findings, *rows]


def plan(one: StageRun, device: Device, devices: int, price: float | None, console: Console) -> int:
    """Prints the student's size; returns 0 when it fits."""
    size = 16 * student(one.run, read(one.run)[1]).num_parameters()
    console.print(f"{size:,} bytes of weights, gradients and optimizer")
    return 0 if size < device.memory else 1


def data_facts(name: str) -> dict[str, Any]:
    """What the record of a run says of its data."""
    recipe = ClassificationRecipe.load(name)
    return {"name": recipe.name, "license": recipe.license, "homepage": recipe.homepage, "source": recipe.source}


METHOD = Method(
    SoftLabelsTrainer,
    predicts="classes",
    build=build,
    dry_run=dry_run,
    check=check,
    examine=examine,
    plan=plan,
    data_facts=data_facts,
)
