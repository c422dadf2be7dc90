"""Whether models fit the tokens of the data: a row in the embeddings for every id, a place for every position.

`mmkd doctor` and the trainers ask the same functions, so that what the one calls a problem the others refuse.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute
from datasets import Dataset
from transformers import PreTrainedConfig

from mmkd.models.load import learns_positions, positions_of

# Its functions are made at run time, so that pyright knows none of them.
compute: Any = pyarrow.compute

_READ = 1000
# Rows that are looked at for what ends an answer, and the share of them that must end alike.
_ENDS = 256
_USUAL = 0.5


@dataclass(frozen=True)
class Misfit:
    """Something that a model lacks for the data, and what to do; a fatal one is an index error in training."""

    message: str
    advice: str
    fatal: bool

    def __str__(self) -> str:
        return f"{self.message} {self.advice}"


@dataclass(frozen=True)
class Extent:
    """How far the sequences of some data reach: tokens of the longest, highest id, highest supervised id."""

    longest: int = 0
    highest: int = -1
    supervised: int = -1

    def __or__(self, other: "Extent") -> "Extent":
        return Extent(
            max(self.longest, other.longest),
            max(self.highest, other.highest),
            max(self.supervised, other.supervised),
        )

    @classmethod
    def of_rows(cls, rows: Iterable[tuple[np.ndarray, np.ndarray]]) -> "Extent":
        """Of (ids, supervised) of some rows."""
        extent = cls()
        for ids, supervised in rows:
            extent |= cls(len(ids), ids.max(initial=-1).item(), ids[supervised].max(initial=-1).item())
        return extent

    @classmethod
    def of(cls, dataset: Any, prefix: str = "") -> "Extent":
        """Of a prepared data set, by the columns with this prefix; of a stream or of rows with images nothing."""
        ids, labels, lengths = (f"{prefix}{name}" for name in ("input_ids", "labels", "seq_lengths"))
        if not isinstance(dataset, Dataset) or not {ids, labels} <= {*dataset.column_names}:
            return cls()
        columns = [name for name in (ids, labels, lengths) if name in dataset.column_names]
        extent = cls()
        for batch in dataset.select_columns(columns).with_format("arrow").iter(_READ):
            table: Any = batch
            sizes = (
                compute.list_flatten(table[lengths]) if lengths in columns else compute.list_value_length(table[ids])
            )
            highest, supervised = (_highest(compute.list_flatten(table[name])) for name in (ids, labels))
            extent |= cls(max(0, _highest(sizes)), highest, supervised)
        return extent


def _highest(values: Any) -> int:
    highest = compute.max(values).as_py()
    return -1 if highest is None else highest


def lacking_positions(role: str, config: PreTrainedConfig, longest: int, max_length: int | None) -> list[Misfit]:
    """What is wrong where sequences, or those that `max_length` allows, are longer than a model is made for.

    Fatal where the model has learnt a vector for each position; other ones compute any, and were trained on fewer.
    """
    positions = positions_of(config)
    if positions is None or max(longest, max_length or 0) <= positions:
        return []
    reached, advice = longest > positions, f"Set max_length: {positions}."
    made = f"The {role} is made for {positions:,} tokens, "
    if not reached:
        return [Misfit(f"{made}max_length is {max_length}.", advice, False)]
    learnt = learns_positions(config)
    rest = "; it has learnt no place for the others." if learnt else "."
    return [Misfit(f"{made}the data has sequences of {longest:,}{rest}", advice, learnt)]


def lacking_tokens(role: str, rows: int, highest: int, named: Mapping[str, int | None]) -> list[Misfit]:
    """What is wrong where the data, or a token that batches need (by what it is), has no row in the embeddings."""
    beyond = {name: index for name, index in named.items() if index is not None and index >= rows}
    if highest >= rows:
        beyond = {"a token of the data": highest, **beyond}
    if not beyond:
        return []
    ids_beyond = ", ".join(f"{name} is {index}" for name, index in beyond.items())
    return [
        Misfit(
            f"The {role} has embeddings for {rows:,} tokens, with ids below {rows}, and {ids_beyond}.",
            "Use the tokenizer and chat template that the model came with, or resize its embeddings to the tokenizer "
            "(model.resize_token_embeddings(len(tokenizer))) and save both.",
            True,
        )
    ]


def unknown_answers(highest: int, tokens: int, tokenizer: Any) -> list[Misfit]:
    """What is wrong where the highest supervised id is none of the `tokens` that student and teacher share."""
    if highest < tokens:
        return []
    return [
        Misfit(
            f"{tokens:,} tokens are compared, and the answers hold {tokenizer.convert_ids_to_tokens(highest)!r} "
            f"({highest}), which the teacher does not know.",
            "Use a template and special tokens that the teacher has too (chat_template_path, eos_token).",
            True,
        )
    ]


def answer_ends(sequences: Iterable[tuple[np.ndarray, np.ndarray]], tokenizer: Any) -> list[int]:
    """The special tokens with which most of the first (ids, supervised) end, white space after them left aside."""
    ends: Counter[int] = Counter()
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    total = 0
    for _, (ids, supervised) in zip(range(_ENDS), sequences, strict=False):
        taught = ids[np.flatnonzero(supervised)][::-1].tolist()
        last = next((index for index in taught if tokenizer.decode([index]).strip()), None)
        total += last is not None
        if last is not None and last in special:
            ends[last] += 1
    return [index for index, count in ends.items() if count >= _USUAL * total]


def add_stops(generation: Any, ends: Iterable[int]) -> list[int]:
    """Lets a generation config stop at these tokens; returns those at which it did not."""
    known = generation.eos_token_id
    stops = [known] if isinstance(known, int) else list(known or [])
    missing = [index for index in ends if index not in stops]
    if missing:
        generation.eos_token_id = [*stops, *missing]
    return missing
