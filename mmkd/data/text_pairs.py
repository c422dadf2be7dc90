"""Pairs of texts that belong together, for encoders of sentences."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from mmkd.errors import UserError
from mmkd.units import with_noun

from .data_recipe import DataRecipe
from .picture_source import hold_out_rows
from .sources import left_out_note, load_split

logger = logging.getLogger(__name__)

PAIR_COLUMNS = (
    ("text", "pair"),
    ("anchor", "positive"),
    ("sentence1", "sentence2"),
    ("query", "positive"),
    ("query", "passage"),
    ("query", "answer"),
    ("question", "answer"),
)
"""Columns with the two texts of a row, the first that are there."""


@dataclass(frozen=True)
class TextPairSplit:
    """Pairs of texts; the second of a pair stands in the place of a picture's only caption."""

    firsts: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    name: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.firsts)

    def __getitem__(self, number: int) -> tuple[str, tuple[str, ...]]:
        """The first text, and the second."""
        return self.firsts[number], self.captions[number]

    def chosen(self, numbers: Iterable[int], *notes: str) -> "TextPairSplit":
        """Some of the pairs; the notes say why."""
        numbers = list(numbers)
        firsts = tuple(self.firsts[number] for number in numbers)
        captions = tuple(self.captions[number] for number in numbers)
        return TextPairSplit(firsts, captions, self.name, (*self.notes, *notes))


@dataclass(frozen=True)
class TextPairs:
    """The pairs of texts of a data source."""

    train: TextPairSplit
    held_out: TextPairSplit | None


def pair_columns(columns: Iterable[str]) -> tuple[str, str] | None:
    """The columns with two texts that belong together; None where there are none."""
    names = set(columns)
    return next((pair for pair in PAIR_COLUMNS if set(pair) <= names), None)


def load_text_pairs(name: str, *, max_train_rows: int | None = None, max_eval_rows: int | None = None) -> TextPairs:
    """The pairs of texts of a data recipe, a file, a folder, a glob or a Hub id.

    A pair that is also held out is not trained on. What is not used is logged. Raises UserError where there are no
    pairs.
    """
    recipe = DataRecipe.load(name)
    if recipe.mixture or recipe.columns:
        raise UserError(
            f"{name}: pairs of texts are read from a source's own columns, and not from a mixture or from `columns`. "
            f"Name the file or the data set itself, with the columns {_listed()}.",
            because="not built",
        )
    raw = {ours: load_split(recipe, theirs) for ours, theirs in recipe.splits.items()}
    for split, dataset in raw.items():
        if note := left_out_note(recipe, dataset):
            logger.warning("%s: %s: %s", recipe.name, split, note)
    rows = hold_out_rows(recipe, raw)
    train = text_pair_split(rows["train"], name, "train")
    held_out = text_pair_split(rows["eval"], name, "eval") if "eval" in rows else None
    if held_out is not None:
        train = _without(train, held_out)
        held_out = _at_most(held_out, max_eval_rows)
    train = _at_most(train, max_train_rows)
    for own in filter(None, (train, held_out)):
        for note in own.notes:
            logger.warning("%s", note)
    return TextPairs(train, held_out)


def text_pair_split(rows: Dataset, source: str, split: str) -> TextPairSplit:
    """The pairs of rows with two columns of texts. Raises UserError where there is no whole pair."""
    columns = pair_columns(rows.column_names)
    if columns is None:
        raise UserError(
            f"{source}: the {split} rows have no pairs; their columns are {', '.join(rows.column_names)}. Name two "
            f"columns of texts {_listed()}, or give pictures with captions."
        )
    firsts: list[str] = []
    captions: list[tuple[str, ...]] = []
    without = 0
    table: Any = rows.select_columns(list(columns))
    for row in table:
        first, second = (str(row[column] or "").strip() for column in columns)
        if first and second:
            firsts.append(first)
            captions.append((second,))
        else:
            without += 1
    notes = (f"{source}: {with_noun(without, f'{split} row')} without a whole pair left out.",) if without else ()
    if not firsts:
        raise UserError(f"{source}: none of the {len(rows):,} {split} rows has two texts in {' and '.join(columns)}.")
    return TextPairSplit(tuple(firsts), tuple(captions), f"the {split} data of {source}", notes)


def _listed() -> str:
    return ", ".join(f"`{first}` and `{second}`" for first, second in PAIR_COLUMNS[:3])


def _at_most(split: TextPairSplit, most: int | None) -> TextPairSplit:
    """So many pairs, drawn at random: files are often sorted."""
    if most is None or most >= len(split):
        return split
    return split.chosen(np.sort(np.random.default_rng(0).permutation(len(split))[:most]).tolist())


def _without(train: TextPairSplit, held_out: TextPairSplit) -> TextPairSplit:
    held = {*zip(held_out.firsts, held_out.captions, strict=True)}
    kept = [number for number in range(len(train)) if train[number] not in held]
    if len(kept) == len(train):
        return train
    if not kept:
        raise UserError(f"All pairs of {train.name} are held out too, so that none is left to learn.")
    left_out = with_noun(len(train) - len(kept), "pair")
    return train.chosen(kept, f"{left_out} of {train.name} left out, which the held-out rows have too.")
