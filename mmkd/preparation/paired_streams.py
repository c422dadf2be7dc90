"""Streams that student and teacher read in tokens of their own: each row for the one, then for the other, as it comes.

Both readings are maps of one stream, so that shards, shuffle buffers and a resumed position work as in any stream.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from datasets import Dataset, IterableDataset
from trl.data_utils import get_dataset_column_names, pack_dataset
from trl.trainer.sft_config import SFTConfig

from mmkd.errors import UserError

from .pairs import QUESTION, joined_members

_RAW = "mmkd_raw"
_READ = ("mmkd_input_ids", "mmkd_labels")
_PACKED = 1000

Read = Callable[[IterableDataset], IterableDataset]
"""Rows -> the rows as one side reads them: `input_ids` and `labels` beside the columns that were there."""


def paired_stream(
    rows: IterableDataset, student: Read, teacher: Read, question: Callable[[Mapping[str, Any]], str] | None = None
) -> IterableDataset:
    """The rows that both sides can use, the teacher's columns beside the student's, and their `QUESTION`s.

    Raises UserError where a side can use none.
    """
    ours = student(rows.map(_with_itself))
    # What is left of the row is the student's; the teacher reads the row as it was.
    unread = ours.map(_unread, remove_columns=_columns(ours, "student"))
    theirs = teacher(unread)
    return theirs.map(partial(_side_by_side, question=question), remove_columns=_columns(theirs, "teacher"))


def packed_stream(rows: IterableDataset, args: SFTConfig) -> IterableDataset:
    """Paired rows packed to `max_length` of the student's tokens, so many rows of the stream at a time."""
    names = get_dataset_column_names(rows)
    return rows.map(
        _packed, batched=True, batch_size=_PACKED, remove_columns=names, fn_kwargs={"length": args.max_length}
    )


def _columns(rows: IterableDataset, side: str) -> list[str]:
    row: Any = next(iter(rows), None)
    if row is None:
        raise UserError(
            f"No row of the stream has a supervised token for the {side}: prompts fill its max_length, or the chat "
            "template marks nothing. Raise max_length or teacher_max_length, or shorten the prompts."
        )
    return list(row)


def _with_itself(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, _RAW: dict(row)}


def _unread(row: dict[str, Any]) -> dict[str, Any]:
    return {**row[_RAW], _RAW: row[_RAW], **dict(zip(_READ, (row["input_ids"], row["labels"]), strict=True))}


def _side_by_side(
    row: dict[str, Any], question: Callable[[Mapping[str, Any]], str] | None
) -> dict[str, list[int] | str]:
    ids, labels = (row[name] for name in _READ)
    pair = {
        "input_ids": ids,
        "labels": labels,
        "teacher_input_ids": row["input_ids"],
        "teacher_labels": row["labels"],
    }
    return pair if question is None else {**pair, QUESTION: question(row[_RAW])}


def _packed(batch: dict[str, list[Any]], length: int) -> dict[str, list[Any]]:
    count = range(len(batch["input_ids"]))
    student = {name: batch[name] for name in ("input_ids", "labels")}
    numbers = [[number] * len(batch["input_ids"][number]) for number in count]
    # As a stream, of which `datasets` shows no progress.
    rows: Any = Dataset.from_dict({**student, "row": numbers}).to_iterable_dataset()
    bins: list[Any] = list(pack_dataset(rows, length, "bfd").with_format(None))
    whole = []
    for entry in bins:
        members = [
            {name: batch[name][number] for name in ("teacher_input_ids", "teacher_labels")}
            for number in dict.fromkeys(entry.pop("row"))
        ]
        whole.append({**entry, **joined_members(members)})
    return {name: [row[name] for row in whole] for name in whole[0]}
