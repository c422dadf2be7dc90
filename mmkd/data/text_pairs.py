"""Pairs of texts that belong together, for encoders of sentences."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from datasets import Dataset

from mmkd.errors import UserError
from mmkd.units import with_noun

from .bounded_splits import bounded
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
"""Columns with two texts that belong together, the first that are there.

`sentence_pairs.py` reads these too, and others, such as premise and hypothesis, that may contradict each other.
"""


@dataclass(frozen=True)
class TextPairSplit:
    """Pairs of texts; the second of a pair stands in the place of a picture's only caption."""

    item: ClassVar[str] = "pair"
    firsts: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    name: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.firsts)

    def __getitem__(self, number: int) -> tuple[str, tuple[str, ...]]:
        """The first text, and the second."""
        return self.firsts[number], self.captions[number]

    @property
    def identities(self) -> list[Any]:
        """What tells its pairs apart."""
        return list(zip(self.firsts, self.captions, strict=True))

    def chosen(self, numbers: Iterable[int], *notes: str) -> Self:
        """Some of the pairs; the notes say why."""
        numbers = list(numbers)
        firsts = tuple(self.firsts[number] for number in numbers)
        captions = tuple(self.captions[number] for number in numbers)
        return replace(self, firsts=firsts, captions=captions, notes=(*self.notes, *notes))


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
    return TextPairs(*bounded(train, held_out, max_train_rows, max_eval_rows))


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
