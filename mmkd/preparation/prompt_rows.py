"""Rows that are prompts alone, which the student answers itself."""

import logging
from collections.abc import Collection
from typing import Any

from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)


def with_open_answers(dataset: Any) -> Any:
    """The rows with an empty completion where they have none: its place is what an on-policy student fills."""
    if not isinstance(dataset, Dataset | IterableDataset):
        return dataset
    row = next(iter(dataset), None)
    if row is None or not is_prompt_alone(row):
        return dataset
    # Not by add_column, which is for data sets at hand only.
    return dataset.map(_with_open_answer)


def answered(evaluation: Any) -> Any:
    """The held-out rows; None, which is said, where they are prompts alone, since nothing measures a student on them.

    Several data sets of them are the caller's own choice and stay.
    """
    if not isinstance(evaluation, Dataset | IterableDataset):
        return evaluation
    row = next(iter(evaluation), None)
    if row is None or not is_prompt_alone(row):
        return evaluation
    logger.warning("The held-out rows are prompts without answers, so that there is no evaluation.")
    return None


def is_prompt_alone(row: Any) -> bool:
    """Whether a row is a prompt without an answer to it."""
    return "prompt" in row and not any(name in row for name in ("completion", "chosen", "input_ids"))


def prompts_only(columns: Collection[str]) -> bool:
    """Whether columns hold prompts, perhaps with pictures, and nothing else."""
    return {*columns} <= {"prompt", "images"}


def _with_open_answer(row: dict[str, Any]) -> dict[str, Any]:
    if isinstance(row["prompt"], str):
        return {"completion": ""}
    in_parts = any(isinstance(message.get("content"), list) for message in row["prompt"])
    return {"completion": [{"role": "assistant", "content": [{"type": "text", "text": ""}] if in_parts else ""}]}
