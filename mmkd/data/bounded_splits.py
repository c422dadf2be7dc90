"""Splits of pictures or pairs that have nothing in common, and at most so many items."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol, Self, TypeVar

import numpy as np

from mmkd.errors import UserError
from mmkd.units import with_noun

logger = logging.getLogger(__name__)


class Items(Protocol):
    """Different items of some rows."""

    item: ClassVar[str]
    """The noun of one of them."""

    def __len__(self) -> int: ...

    @property
    def name(self) -> str:
        """Of the rows."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What is left out of the rows, in sentences."""
        ...

    @property
    def identities(self) -> Sequence[Any]:
        """What tells the items apart."""
        ...

    def chosen(self, numbers: Iterable[int], *notes: str) -> Self:
        """Some of the items; the notes say why."""
        ...


Split = TypeVar("Split", bound=Items)


def check_bounds(**bounds: int | None) -> None:
    """Raises UserError for a number of pictures below 1."""
    for key, rows in bounds.items():
        if rows is not None and rows < 1:
            raise UserError(f"{key} is {rows}; give 1 or more, or leave it out for all pictures.")


def bounded(
    train: Split, held_out: Split | None, max_train_rows: int | None, max_eval_rows: int | None
) -> tuple[Split, Split | None]:
    """Two splits that have no item in common and at most so many; what is left out is logged."""
    if held_out is not None:
        train = _without(train, held_out)
        held_out = _at_most(held_out, max_eval_rows)
    train = _at_most(train, max_train_rows)
    for split in filter(None, (train, held_out)):
        for note in split.notes:
            logger.warning("%s", note)
    return train, held_out


def _at_most(split: Split, most: int | None) -> Split:
    """So many items, drawn at random: files are often sorted."""
    if most is None or most >= len(split):
        return split
    return split.chosen(np.sort(np.random.default_rng(0).permutation(len(split))[:most]).tolist())


def _without(train: Split, held_out: Split) -> Split:
    """The items of train that are not among those held out."""
    held = {*held_out.identities}
    kept = [number for number, identity in enumerate(train.identities) if identity not in held]
    left_out = len(train) - len(kept)
    if not left_out:
        return train
    if not kept:
        raise UserError(f"All {train.item}s of {train.name} are held out too, so that none is left to learn.")
    note = f"{with_noun(left_out, train.item)} of {train.name} left out, which the held-out rows show too."
    return train.chosen(kept, note)
