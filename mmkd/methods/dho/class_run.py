"""What a recipe of classes says: its settings, its rows with the unlabelled ones, and what it must not set."""

from dataclasses import dataclass
from typing import Any

import datasets
from transformers.utils import logging

from mmkd.data.class_rows import ClassRows
from mmkd.data.classification import ClassificationData, ClassificationRecipe, load_classification
from mmkd.errors import UserError
from mmkd.recipe.recipe import Run
from mmkd.recipe.unread_keys import check_read, unread_keys

from .dho_config import DHOConfig
from .dho_trainer import DHOTrainer
from .unseen_classes import UnseenRows, split_classes

logger = logging.get_logger(__name__)

# What a recipe of every method may set, and a classifier's run reads.
_READ = {"method", "data", "teacher", "teacher_revision", "teacher_dtype", "teacher_attn_implementation"}
_READ |= {"teacher_cache", "teachers", "student", "student_init", "max_train_rows", "max_eval_rows", "dry_run"}


@dataclass(frozen=True)
class Classes:
    """The data of a recipe of classes."""

    data: ClassificationData
    rows: ClassRows
    """Those of train and, after them, the unlabelled ones, as a teacher reads them."""
    unseen: UnseenRows | None = None
    """Measured rows of classes that training never sees."""

    @property
    def is_text(self) -> bool:
        """Whether the rows are texts, and not images."""
        return self.data.recipe.text is not None


def load_classes(run: Run) -> Classes:
    """The rows of a recipe of classes. Raises UserError as `load_classification` does."""
    arguments = run.arguments
    recipe = ClassificationRecipe.load(arguments.data)
    data = load_classification(recipe, max_train_rows=arguments.max_train_rows, max_eval_rows=arguments.max_eval_rows)
    training = settings_of(run)
    unseen = None if data.unseen is None else UnseenRows(data.unseen, data.unseen_names)
    if training.unseen_classes is not None and unseen is not None:
        raise UserError(
            "unseen_classes takes rows out of the data, which has an unseen split of its own: keep one.",
            because="meaning",
        )
    if training.unseen_classes is not None:
        data, unseen = split_classes(data, training.unseen_classes)
    if unseen is not None and not training.term_weights:
        logger.warning("The unseen split is not measured: the student learns no embedding (such as vl_align_weight).")
        unseen = None
    rows = data.train
    if data.unlabeled is not None:
        rows = datasets.concatenate_datasets([rows, data.unlabeled.cast(rows.features)])
    return Classes(data, ClassRows(rows, None), unseen)


def settings_of(run: Run) -> DHOConfig:
    """The settings of the method."""
    config: Any = run.training
    assert isinstance(config, DHOConfig)
    return config


def check_arguments(run: Run) -> None:
    """Raises UserError for keys of tokens, and for a student that cannot be trained."""
    check_read(run.arguments, _READ, "it is about tokens. Remove it.")
    _check_teachers(run)
    if run.cache.job == "generate":
        raise UserError(
            "Method dho learns from no text, so no answers are generated for it. Remove job, or set it to aspects.",
            because="meaning",
        )
    if run.student.use_peft or run.student.load_in_4bit or run.student.load_in_8bit:
        raise UserError(
            "Method dho trains the whole student; remove use_peft, load_in_4bit and load_in_8bit.", because="not built"
        )
    if run.arguments.student is None or run.arguments.student_init == "prune":
        raise UserError(
            "Set `student` to a vision model, a text model or, with student_init: random, its config.",
            because="not built",
        )


def _check_teachers(run: Run) -> None:
    """Raises UserError for a key of one of several teachers that is about tokens."""
    several = run.arguments.teachers
    read = {"weight", *DHOTrainer.teacher_keys, *(key for key in _READ if key.startswith("teacher"))} - {"teachers"}
    for name, keys in several.items() if isinstance(several, dict) else ():
        unread = next((key for key in keys if key not in read), None)
        if unread is not None:
            raise UserError(
                f"teachers.{name} sets {unread}, which is about tokens and which method dho does not read. Remove it.",
                because="meaning",
            )


def unused_keys() -> dict[str, str]:
    """The keys of every recipe that one of classes has no use for -> why.

    Those of a cache are among them: the logits of classes are written in one way.
    """
    return unread_keys(_READ, "It is about tokens.", "The whole student is trained.", {"job"})


def class_data_facts(name: str) -> dict[str, Any]:
    """Name, licence, homepage and source of a data recipe of classes."""
    recipe = ClassificationRecipe.load(name)
    return {"name": recipe.name, "license": recipe.license, "homepage": recipe.homepage, "source": recipe.source}
