"""What a method sees of the student, and what it answers: the losses of the items of one micro-batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from jaxtyping import Float, Int
from torch import Tensor

from mmkd.models.heads import LMHead


@dataclass(frozen=True)
class Supervised:
    """The student at the positions that predict a supervised token; row i predicts `labels[i]`."""

    hidden: Float[Tensor, "token width"]
    head: LMHead
    labels: Int[Tensor, "token"]


@dataclass
class ItemLosses:
    """What one micro-batch adds up to."""

    totals: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Kind of item -> sum of the losses of its items, with gradient. Each is divided by its own global count."""
    reports: dict[str, tuple[Tensor, Tensor | int]] = field(default_factory=dict[str, tuple[Tensor, Tensor | int]])
    """Name in the logs -> (sum, number of items), without gradient."""

    @staticmethod
    def added(terms: Mapping[str, Tensor], items: Mapping[str, str]) -> dict[str, Tensor]:
        """The sums of terms, by the kind of the items of each."""
        totals: dict[str, Tensor] = {}
        for name, term in terms.items():
            kind = items[name]
            totals[kind] = totals[kind] + term if kind in totals else term
        return totals

    @classmethod
    def of_parts(cls, parts: Mapping[str, Self], by_teacher: Sequence[str]) -> Self:
        """The sums of the losses of several teachers, each over its own items.

        The reports `by_teacher` are there for each by its name, too.
        """
        whole = cls()
        for name, part in parts.items():
            for kind, total in part.totals.items():
                whole.totals[kind] = whole.totals[kind] + total if kind in whole.totals else total
            named = {f"{report}_{name}": part.reports[report] for report in by_teacher if report in part.reports}
            for report, (total, count) in {**part.reports, **named}.items():
                before, items = whole.reports.get(report, (0, 0))
                whole.reports[report] = (before + total, items + count)
        return whole
