"""Turns of weight 0, as OpenAI's files mark what is only read: refused where every turn would be learnt from."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, Json

from mmkd.data.arrow import read_rows
from mmkd.data.messages import is_learnt
from mmkd.errors import UserError


def check_weights(row: Mapping[str, Any], number: int, split: str, completion_only: bool) -> None:
    """Raises UserError for a turn of weight 0 in a row in which every turn, or every turn of an answer, is learnt."""
    columns = ("messages", "completion") if completion_only else ("messages", "prompt", "completion")
    for column in columns:
        messages = row.get(column)
        for place, message in enumerate(messages if isinstance(messages, list) else []):
            if isinstance(message, Mapping) and message.get("role") == "assistant" and not is_learnt(message):
                raise UserError(
                    f"Row {number} of the {split} data: {column}[{place}] has weight 0, and all turns would be "
                    "learnt from. Set assistant_only_loss: true, which leaves such turns out, or remove the weight.",
                    because="meaning",
                )


def check_all_weights(dataset: Any, split: str, completion_only: bool) -> Any:
    """The rows, looked at by `check_weights`: now, or for a stream when they come. Images stay unread."""
    if not isinstance(dataset, Dataset):
        return dataset.map(_weighed, with_indices=True, fn_kwargs={"split": split, "completion_only": completion_only})
    columns = [
        name
        for name in ("messages", "prompt", "completion")
        if name in dataset.column_names and _may_weigh(dataset.features[name])
    ]
    for number, row in enumerate(read_rows(dataset, columns) if columns else ()):
        check_weights(row, number, split, completion_only)
    return dataset


def _weighed(row: dict[str, Any], number: int, split: str, completion_only: bool) -> dict[str, Any]:
    check_weights(row, number, split, completion_only)
    return row


def _may_weigh(feature: Any) -> bool:
    inner = getattr(feature, "feature", None)
    return isinstance(inner, Json) or (isinstance(inner, dict) and "weight" in inner)
