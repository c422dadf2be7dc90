"""Pairs of sentences of any data, with or without a score of how alike they are."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from mmkd.errors import UserError
from mmkd.units import with_noun

from .data_recipe import DataRecipe
from .sources import load_split
from .text_pairs import PAIR_COLUMNS

logger = logging.getLogger(__name__)

_IN_ANY_RELATION = (
    ("sentence1", "sentence2"),
    ("sentence_a", "sentence_b"),
    ("text1", "text2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("question", "answer"),
    ("anchor", "positive"),
    ("prompt", "completion"),
)
# Of the second table every pair belongs together, which is more than a pair has to do here.
PAIR_NAMES = tuple(dict.fromkeys((*_IN_ANY_RELATION, *PAIR_COLUMNS)))
"""Columns that hold a pair, in the order in which they are looked for."""

SCORE_NAMES = ("score", "similarity", "similarity_score", "relatedness_score", "label")


@dataclass(frozen=True)
class SentencePairs:
    """The first and the second sentence of every pair, and what is said of how alike they are."""

    first: list[str]
    second: list[str]
    scores: list[float] | None = None

    def __len__(self) -> int:
        return len(self.first)


def load_pairs(name: str, *, scored: bool = False, max_rows: int | None = None) -> SentencePairs:
    """The pairs of a file, a folder, a glob, a Hub id or a data recipe.

    Scored ones are of the split for evaluation where there is one, others of that for training. Columns are those
    that a recipe calls prompt and completion, or the first of `PAIR_NAMES`. A row with an empty sentence is left out
    with a warning. Raises UserError where there are no pairs, or with `scored` no scores.
    """
    recipe = DataRecipe.load(name)
    # Scored pairs measure, and are those that a source keeps apart for it where there are any.
    split = (recipe.splits.get("eval") if scored else None) or recipe.splits.get("train", "train")
    rows = load_split(recipe, split)
    first, second = _columns(name, rows, recipe.columns)
    score = _score_column(name, rows) if scored else None
    kept: list[tuple[Any, Any, Any]] = []
    empty = 0
    for row in rows.select_columns([part for part in (first, second, score) if part is not None]):
        values: Any = row
        pair = (values[first], values[second])
        if not all(isinstance(sentence, str) and sentence.strip() for sentence in pair):
            empty += 1
            continue
        kept.append((*pair, None if score is None else _number(name, values[score], score)))
        if len(kept) == max_rows:
            break
    if empty:
        logger.warning("%s: %s without both sentences left out.", name, with_noun(empty, "row"))
    if not kept:
        raise UserError(f"{name} has no pair of sentences: {first} or {second} of every row is empty.")
    scores = None if score is None else [float(value) for _, _, value in kept]
    if scores is not None and len(set(scores)) < 2:
        raise UserError(f"All scores in the column {score} of {name} are {scores[0]:g}: nothing can be measured.")
    return SentencePairs([pair[0] for pair in kept], [pair[1] for pair in kept], scores)


def pair_facts(name: str) -> dict[str, Any]:
    """Name, licence, homepage and source of the data."""
    recipe = DataRecipe.load(name)
    return {key: getattr(recipe, key) for key in ("name", "license", "homepage", "source")}


def _columns(name: str, rows: Dataset, columns: Any) -> tuple[str, str]:
    ours: Sequence[tuple[Any, Any]] = [(columns.get("prompt"), columns.get("completion")), *PAIR_NAMES]
    for first, second in ours:
        if {first, second} <= set(rows.column_names):
            return first, second
    raise UserError(
        f"{name} has the columns {', '.join(rows.column_names)}, and none of the pairs that are known: "
        f"{', '.join(' and '.join(pair) for pair in PAIR_NAMES[:4])}, ... Rename them, or write a data recipe with "
        "columns: {prompt: FIRST, completion: SECOND}."
    )


def _score_column(name: str, rows: Dataset) -> str:
    for column in SCORE_NAMES:
        if column in rows.column_names:
            return column
    raise UserError(
        f"{name} has the columns {', '.join(rows.column_names)}, and no score of its pairs: name one of them "
        f"{SCORE_NAMES[0]}."
    )


def _number(name: str, value: Any, column: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise UserError(f"{name}: the {column} of a row is {value!r:.40} and no number.")
    return float(value)
