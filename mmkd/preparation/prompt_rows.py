"""Rows that are prompts alone, which the student answers itself."""

from typing import Any

from datasets import Dataset, IterableDataset


def with_open_answers(dataset: Any) -> Any:
    """The rows with an empty completion where they have none: its place is what an on-policy student fills."""
    if not isinstance(dataset, Dataset | IterableDataset):
        return dataset
    row = next(iter(dataset), None)
    if row is None or not is_prompt_alone(row):
        return dataset
    # Not by add_column, which is for data sets at hand only.
    return dataset.map(_with_open_answer)


def is_prompt_alone(row: Any) -> bool:
    """Whether a row is a prompt without an answer to it."""
    return "prompt" in row and not any(name in row for name in ("completion", "chosen", "input_ids"))


def _with_open_answer(row: dict[str, Any]) -> dict[str, Any]:
    if isinstance(row["prompt"], str):
        return {"completion": ""}
    in_parts = any(isinstance(message.get("content"), list) for message in row["prompt"])
    return {"completion": [{"role": "assistant", "content": [{"type": "text", "text": ""}] if in_parts else ""}]}
