"""How much of the data is learnt from: tokens, supervised ones, and what max_length takes away."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from jaxtyping import Bool
from trl.trainer.sft_config import SFTConfig

from mmkd.data.left_out import LeftOut

_READ = 1000


def cuts(args: SFTConfig) -> bool:
    """Whether what lies beyond max_length is lost; some ways of packing begin a new sequence with it instead."""
    return args.max_length is not None and (not args.packing or args.packing_strategy == "bfd")


def kept(length: int, args: SFTConfig) -> slice:
    """The part of a row of so many tokens that training sees."""
    if not cuts(args):
        return slice(0, length)
    assert args.max_length is not None
    # Packing cuts at the end, whatever truncation_mode says.
    if args.truncation_mode == "keep_end" and not args.packing:
        return slice(max(0, length - args.max_length), length)
    return slice(0, min(length, args.max_length))


@dataclass(frozen=True)
class TokenCounts:
    """What a data set has before it is cut, and what max_length takes of it."""

    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    longest: int = 0
    silent: int = 0
    """Rows without any supervised token."""
    max_length: int | None = None
    cut: int = 0
    """Rows that are longer than max_length."""
    lost_tokens: int = 0
    lost_supervised: int = 0
    emptied: int = 0
    """Rows whose supervised tokens are all lost."""
    of: int | None = None
    """Rows of the whole data set where these are a sample of it."""

    @classmethod
    def count(
        cls, sequences: Iterable[Bool[np.ndarray, "token"]], args: SFTConfig, of: int | None = None
    ) -> "TokenCounts":
        """Of sequences, given by which of their tokens are supervised."""
        numbers = dict.fromkeys(("rows", "tokens", "supervised", "silent", "cut"), 0)
        numbers |= dict.fromkeys(("lost_tokens", "lost_supervised", "emptied", "longest"), 0)
        for mask in sequences:
            length, supervised, part = len(mask), int(mask.sum()), kept(len(mask), args)
            # Nothing predicts the first token that is kept.
            learnt = int(mask[part].sum()) - (part.start > 0 and bool(mask[part.start]))
            numbers["rows"] += 1
            numbers["tokens"] += length
            numbers["supervised"] += supervised
            numbers["longest"] = max(numbers["longest"], length)
            numbers["silent"] += not supervised
            numbers["cut"] += length > part.stop - part.start
            numbers["lost_tokens"] += length - (part.stop - part.start)
            numbers["lost_supervised"] += supervised - learnt
            numbers["emptied"] += bool(supervised) and not learnt
        return cls(**numbers, max_length=args.max_length if cuts(args) else None, of=of)

    @property
    def size(self) -> str:
        """Rows, tokens and the supervised share, in a line."""
        share = f"{self.supervised / self.tokens:.0%}" if self.tokens else "0%"
        silent = f"; {self.silent:,} rows have no supervised token and teach nothing" if self.silent else ""
        sample = f"a sample of {self.rows:,} of {self.of:,} rows" if self.of else f"{self.rows:,} rows"
        return f"{sample}, {self.tokens:,} tokens, {self.supervised:,} of them supervised ({share}){silent}"

    @property
    def cutting(self) -> str:
        """The longest row and what max_length takes away, in a line."""
        longest = f"the longest row has {self.longest:,} tokens"
        if self.max_length is None:
            return f"{longest}; nothing is cut off"
        if not self.cut:
            return f"{longest}; max_length {self.max_length} cuts none"
        lost, unlearnt = self.lost_tokens / self.tokens, self.lost_supervised / max(1, self.supervised)
        emptied = f"; {self.emptied:,} rows keep nothing to learn and are left out" if self.emptied else ""
        return (
            f"{longest}; max_length {self.max_length} cuts {self.cut:,} of {self.rows:,} rows "
            f"({self.cut / self.rows:.0%}) and loses {lost:.1%} of the tokens, {unlearnt:.1%} of the supervised "
            f"ones{emptied}"
        )

    def __str__(self) -> str:
        return f"{self.size}; {self.cutting}."


def supervised_of(dataset: Dataset) -> Iterable[Bool[np.ndarray, "token"]]:
    """Which tokens of each row of a labelled data set are supervised; the first never is, as nothing predicts it."""
    for batch in dataset.select_columns("labels").with_format("numpy").iter(_READ):
        rows: Any = batch
        for labels in rows["labels"]:
            supervised = np.asarray(labels) != -100
            supervised[:1] = False
            yield supervised


def teaching(dataset: Dataset, args: SFTConfig, split: str) -> Dataset:
    """The labelled rows without those that trl drops, which are counted and said.

    It drops rows without a label where it cuts; others it leaves alone, which changes nothing about what is learnt.
    """
    if args.max_length is None or args.packing:
        return dataset
    left_out = LeftOut(split)
    for row, supervised in enumerate(supervised_of(dataset)):
        if not supervised.any():
            left_out.add(row, "without a supervised token")
        elif not supervised[kept(len(supervised), args)].any():
            left_out.add(row, f"with no supervised token within max_length {args.max_length}")
    left_out.warn(len(dataset))
    if not len(left_out):
        return dataset
    gone = {row for rows in left_out.rows.values() for row in rows}
    return dataset.select([row for row in range(len(dataset)) if row not in gone])
