"""Videos and audio in data, which nothing here learns from: found by their columns and by their parts of messages."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from datasets import Dataset

from mmkd.errors import UserError

COLUMNS = {"video": "videos", "videos": "videos", "audio": "audio", "audios": "audio"}
"""The columns in which data sets keep them."""

PARTS = {
    "video": "videos",
    "video_url": "videos",
    "input_video": "videos",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
}
"""The types of parts of messages that hold them."""


def advice(kind: str) -> str:
    """What to do about rows of a kind."""
    if kind == "videos":
        return "mmkd does not train on videos yet. Map their frames to images, or leave such rows out"
    return "mmkd does not train on audio yet. Map its transcript to text, or leave such rows out"


def check_no_recordings(data: Dataset | Mapping[str, Any], subject: str) -> None:
    """Raises UserError for rows (or one row) with a video or audio in a column of their own.

    Such a column is not among those of a layout, and the text would be learnt from without what it is about.
    """
    for name in data.column_names if isinstance(data, Dataset) else data:
        if name in COLUMNS and _holds(data, name):
            kind = COLUMNS[name]
            raise UserError(
                f"{subject} has {kind} in the column {name!r}: {advice(kind)}. To learn from the text alone, remove "
                "the column, or name the columns to read in a data recipe (columns:).",
                because="not built",
            )


def _holds(data: Any, name: str) -> bool:
    if not isinstance(data, Dataset):
        return bool(data[name])
    if data.format["type"] == "custom":
        first: Any = next(iter(data), {})
        return bool(first.get(name))
    # As Arrow, which decodes nothing.
    column: Any = data.select_columns([name]).with_format("arrow")[:][name]
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return any(len(value) for chunk in column.chunks for value in chunk if value.is_valid)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return any(value.as_py() for value in column)
    return column.null_count < len(column)
