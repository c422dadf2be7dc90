"""Streams that student and teacher read in tokens of their own: each row for the one, then for the other, as it comes.

Both readings are maps of one stream, so that shards, shuffle buffers and a resumed position work as in any stream.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from datasets import Dataset, IterableDataset
from trl.data_utils import get_dataset_column_names, pack_dataset
from trl.trainer.sft_config import SFTConfig

from mmkd.errors import UserError

from .pairs import QUESTION, joined_members, teacher_prefixes

_RAW, _READ = "mmkd_raw", "mmkd_read_"
_TOKENS = ("input_ids", "labels")
_PACKED = 1000

Read = Callable[[IterableDataset], IterableDataset]
"""Rows -> the rows as one side reads them: `input_ids` and `labels` beside the columns that were there."""


def paired_stream(
    rows: IterableDataset,
    sides: Mapping[str, Read],
    kept: Sequence[str] = (),
    question: Callable[[Mapping[str, Any]], str] | None = None,
) -> IterableDataset:
    """The rows that all sides can use, each side's tokens in columns with its prefix: "" is the student's.

    Rows keep the columns `kept` and, where it is asked for, their `QUESTION`s. Raises UserError where a side can use
    none.
    """
    rows = rows.map(_with_itself)
    for prefix, read in sides.items():
        rows = read(rows)
        # What is left of the row is this side's; the next one reads the row as it was.
        names = _columns(rows, "teacher" if prefix else "student")
        rows = rows.map(partial(_unread, prefix=prefix), remove_columns=names)
    settings = {"prefixes": list(sides), "kept": list(kept), "question": question}
    return rows.map(partial(_side_by_side, **settings), remove_columns=_columns(rows, "teacher"))


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


def _unread(row: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The row as it was, with what each side has read so far."""
    read = {name: value for name, value in row.items() if name.startswith(_READ)}
    own = {f"{_READ}{prefix}{name}": row[name] for name in _TOKENS}
    return {**row[_RAW], _RAW: row[_RAW], **read, **own}


def _side_by_side(
    row: dict[str, Any],
    prefixes: Sequence[str],
    kept: Sequence[str],
    question: Callable[[Mapping[str, Any]], str] | None,
) -> dict[str, Any]:
    sides = {f"{prefix}{name}": row[f"{_READ}{prefix}{name}"] for prefix in prefixes for name in _TOKENS}
    more = {name: row[_RAW][name] for name in kept}
    return {**sides, **more} if question is None else {**sides, **more, QUESTION: question(row[_RAW])}


def _packed(batch: dict[str, list[Any]], length: int) -> dict[str, list[Any]]:
    count = range(len(batch["input_ids"]))
    student = {name: batch[name] for name in _TOKENS}
    prefixes = teacher_prefixes(list(batch))
    read = [f"{prefix}{name}" for prefix in prefixes for name in _TOKENS]
    others = [name for name in batch if name not in (*_TOKENS, *read)]
    numbers = [[number] * len(batch["input_ids"][number]) for number in count]
    # As a stream, of which `datasets` shows no progress.
    rows: Any = Dataset.from_dict({**student, "row": numbers}).to_iterable_dataset()
    bins: list[Any] = list(pack_dataset(rows, length, "bfd").with_format(None))
    whole = []
    for entry in bins:
        members = list(dict.fromkeys(entry.pop("row")))
        theirs = [{name: batch[name][member] for name in read} for member in members]
        more = {name: [batch[name][member] for member in members] for name in others}
        whole.append({**entry, **joined_members(theirs, prefixes), **more})
    return {name: [row[name] for row in whole] for name in whole[0]}
