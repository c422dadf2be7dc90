"""Rows of an accumulated batch that are compared with each other: read first without a graph, then learnt by parts."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mmkd.training.gradient_cache import PartGradients, RandomState, shares

from .class_terms import ClassTerms, Counts, Reports, RowsSaid

Batch = Mapping[str, Tensor]


def told_of(batch: Batch) -> dict[str, Tensor]:
    """What of a batch the loss reads, and the student does not."""
    return {name: values for name, values in batch.items() if name == "labels" or name.startswith("teacher_")}


class ComparedParts:
    """The parts of one accumulated batch, and what the terms that compare all its rows say of each part."""

    def __init__(self, terms: ClassTerms, parts: Sequence[Batch], counts: Counts):
        self.terms, self.parts, self.counts = terms, parts, counts
        self._shares: list[PartGradients] = []

    @property
    def apart(self) -> bool:
        """Whether there are such terms, and rows of several parts to compare."""
        return len(self.parts) > 1 and self.terms.compares_rows

    def next_share(self, read: Callable[[Batch], RowsSaid], device: torch.device) -> tuple[PartGradients, Reports]:
        """What the terms say of the part that comes next, and reports of all parts with the first one.

        `read` asks the student about a part.
        """
        reports: Reports = {}
        if not self._shares:
            self._shares, reports = self._of_all_parts(read, device)
        return self._shares.pop(0), reports

    def _of_all_parts(
        self, read: Callable[[Batch], RowsSaid], device: torch.device
    ) -> tuple[list[PartGradients], Reports]:
        states, said = [], []
        for part in self.parts:
            states.append(RandomState.now(device))
            with torch.no_grad():
                said.append(read(part))
        rows = RowsSaid.joined(said)
        told = [told_of(part) for part in self.parts]
        whole = {name: torch.cat([own[name] for own in told]).to(device) for name in told[0]}
        loss, reports = self.terms.across(rows, whole, self.counts)
        assert loss is not None
        return shares(loss, rows.known, [], [len(own["labels"]) for own in told], states), reports
