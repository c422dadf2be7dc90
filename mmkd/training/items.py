"""What a method sees of the student, and what it answers: the losses of the items of one micro-batch."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmkd.models.heads import LMHead
from mmkd.teachers.batch import RolloutTokens

Terms = Mapping[str, Mapping[str, Tensor]]
"""Term of a loss -> kind of item -> sum of the term over items of this kind."""

Reports = dict[str, tuple[Tensor, Tensor | float]]
"""Name in the logs -> (sum, number of items), without gradient."""


DATA_TOKEN = "data_token"
"""The kind of item of tokens that are not the student's own, where cross-entropy is a mean over them alone."""


def kind_of(items: str, teacher: str) -> str:
    """The kind of items that one of several teachers counts in its own way; `items` itself for the only teacher."""
    return f"{items}/{teacher}" if teacher else items


def add_share(
    reports: Reports, report: str, entry: tuple[Tensor, Tensor | float], weight: float, teacher: str
) -> None:
    """Adds the (sum, number of items) of one teacher, with its weight, to those of a report; and as REPORT_NAME."""
    total, count = entry
    before, items = reports.get(report, (0.0, 0))
    reports[report] = (before + weight * total.detach(), items + weight * count)
    if teacher:
        reports[f"{report}_{teacher}"] = (total.detach(), count)


@dataclass(frozen=True)
class Supervised:
    """The student at the positions that predict a supervised token; row i predicts `labels[i]`."""

    hidden: Float[Tensor, "token width"]
    head: LMHead
    labels: Int[Tensor, "token"]
    rollout: RolloutTokens | None = field(default=None, kw_only=True)
    """Which of the tokens the student said itself; None where it said none of the micro-batch."""
    answers: Int[Tensor, "token"] | None = field(default=None, kw_only=True)
    """The number of the answer that each token belongs to, where there are rollouts: a run of supervised tokens."""

    @property
    def own(self) -> Bool[Tensor, "token"]:
        """Which of the tokens the student said itself."""
        return torch.zeros_like(self.labels, dtype=torch.bool) if self.rollout is None else self.rollout.own

    def at(self, tokens: Bool[Tensor, "token"]) -> "Supervised":
        """The student at some of its tokens."""
        return Supervised(self.hidden[tokens], self.head, self.labels[tokens])


ReadStudent = Callable[[Tensor | None], Supervised]
"""(tokens, or None for all) -> the student at those of the supervised positions."""


@dataclass
class ItemLosses:
    """What one micro-batch adds up to."""

    totals: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Kind of item -> sum of the losses of its items, with gradient. Each is divided by its own global count."""
    reports: Reports = field(default_factory=Reports)

    @staticmethod
    def added(terms: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The sums of terms by the kind of their items."""
        totals: dict[str, Tensor] = {}
        for term in terms:
            for kind, total in term.items():
                totals[kind] = totals[kind] + total if kind in totals else total
        return totals

    @classmethod
    def of_parts(cls, parts: Mapping[str, Self], by_teacher: Sequence[str]) -> Self:
        """The sums of the losses of several teachers, each over its own items.

        The reports `by_teacher` are there for each by its name, too.
        """
        whole = cls(cls.added(part.totals for part in parts.values()))
        for name, part in parts.items():
            named = {f"{report}_{name}": part.reports[report] for report in by_teacher if report in part.reports}
            for report, (total, count) in {**part.reports, **named}.items():
                before, items = whole.reports.get(report, (0, 0))
                whole.reports[report] = (before + total, items + count)
        return whole
