"""The recipe of a classifier, made of answers and of the data's labels."""

from collections import Counter

from mmkd.data.classification import HIDDEN, ClassificationData, ClassificationRecipe, load_classification
from mmkd.errors import UserError
from mmkd.recipe.recipe import Recipe

from .draft import Draft
from .init_answers import Answers
from .looking import OPEN_CLIP, config_of
from .memory_fit import Fit, fit_by_plan
from .token_recipe import schedule

_SHOWN = 0.9
"""The share of labels that is learnt where all rows have one; of the other rows only the teacher speaks."""


def draft_classes(answers: Answers) -> tuple[Draft, Fit]:
    """The recipe of answers, and how it fits the device. Raises UserError for data that cannot be read."""
    data = load_classification(ClassificationRecipe.load(answers.data))
    draft = Draft()
    draft.set(
        "models", "method", answers.task.method, "Two heads on one backbone: one learns labels, one the teacher."
    )
    draft.set("models", "teacher", answers.teacher)
    kind, why = _teacher_kind(answers, data)
    draft.set("models", "teacher_kind", kind, why)
    draft.set(
        "models",
        "teacher_cache",
        answers.teacher_folder,
        "The teacher reads every row once; its answers are kept here for this run and the next ones.",
    )
    assert answers.student is not None
    draft.set("models", "student", answers.student)
    draft.set("data", "data", answers.data)
    labelled = _labels(draft, data)
    if data.validation is None:
        text = "There are no validation rows to choose these on: the paper's values."
        draft.set("method", "alpha", 0.5, text)
        draft.set("method", "beta", 0.5)
    rows = len(data.train) + (0 if data.unlabeled is None else len(data.unlabeled))
    if data.recipe.text is None:
        draft.set(
            "method",
            "augmentation",
            "crop_flip",
            "The student sees parts and mirror images; none for text in pictures, or where left and right matter.",
        )
    draft.set("training", "output_dir", answers.output_dir, "The student, its checkpoints and its logs.")
    fit = fit_by_plan(Recipe.of(draft.keys, answers.output), answers.device, _batches(labelled, rows))
    _batch(draft, answers, fit, labelled, rows)
    return draft, fit


def _teacher_kind(answers: Answers, data: ClassificationData) -> tuple[str, str]:
    if answers.teacher.startswith(OPEN_CLIP):
        return "zero_shot", "Compares pictures with a sentence about each class."
    config = config_of(answers.teacher, "teacher")
    if hasattr(config, "text_config") and hasattr(config, "vision_config") and hasattr(config, "projection_dim"):
        if data.recipe.text is not None:
            raise UserError(
                f"{answers.teacher} compares pictures with texts, and {answers.data} has texts alone. Name a language "
                "model or a classifier of texts."
            )
        return "zero_shot", "Compares pictures with a sentence about each class (`prompts` of a data recipe)."
    if any("Classification" in name for name in config.architectures or []):
        return "classifier", "It knows the same classes."
    return "question", "It is asked which class a row is of."


def _labels(draft: Draft, data: ClassificationData) -> int:
    """Sets how many labels are shown; how many those are."""
    counts = Counter(label for label in data.train["label"] if label != HIDDEN)
    labelled, hidden = sum(counts.values()), len(data.train) - sum(counts.values())
    if hidden or data.unlabeled is not None:
        return labelled
    draft.set(
        "method",
        "label_fraction",
        _SHOWN,
        f"All {labelled:,} rows have a label. The method learns from rows without one too: the labels of one row in "
        "ten are not shown. With pictures that have none, put them into a split `unlabeled` and remove this.",
    )
    return round(_SHOWN * labelled)


def _batches(labelled: int, rows: int) -> list[dict[str, int]]:
    """Batches from large to small, mixed as the data are, and at least a quarter labelled."""
    most = max(4, rows // 8)
    sizes = [size for size in (64, 32, 16, 8, 4) if size <= most]
    return [
        {
            "per_device_train_batch_size": (shown := min(size - 1, max(size // 4, round(size * labelled / rows)))),
            "unlabeled_batch_size": size - shown,
        }
        for size in sizes
    ]


def _batch(draft: Draft, answers: Answers, fit: Fit, labelled: int, rows: int) -> None:
    """The batch and the schedule."""
    verdict = "fit" if fit.fits else "DO NOT FIT"
    draft.set(
        "memory",
        "per_device_train_batch_size",
        fit.batch,
        f"Labelled rows of a batch, beside those without a label. "
        f"They {verdict} {answers.device.name}, says `mmkd plan`.",
    )
    unlabelled = fit.keys["unlabeled_batch_size"]
    draft.set("memory", "unlabeled_batch_size", unlabelled)
    draft.set("memory", "per_device_eval_batch_size", 2 * (fit.batch + unlabelled))
    epochs = 20
    draft.set("training", "num_train_epochs", epochs, "Passes over the rows without a label.")
    draft.set(
        "training",
        "learning_rate",
        1e-3 if _convolutional(answers) else 1e-4,
        "1e-3 for convolutional networks, 1e-4 for transformers.",
    )
    draft.set("training", "weight_decay", 0.01)
    draft.set("training", "lr_scheduler_type", "cosine")
    draft.set("training", "warmup_steps", 0.1, "A share of all steps.")
    if answers.device.kind != "cpu":
        draft.set("training", "bf16", True)
        draft.set("training", "dataloader_num_workers", 4, "Pictures are read and decoded beside the training.")
    schedule(draft, max(1, rows - labelled), unlabelled, epochs, False)


def _convolutional(answers: Answers) -> bool:
    config = config_of(str(answers.student), "student")
    return not hasattr(config, "num_attention_heads") and not hasattr(config, "vision_config")
