"""How well images and texts find each other: ranks among all candidates, and predictions of classes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmkd.errors import UserError

_BLOCK = 512
"""Queries at a time, so that the scores of many thousands fit into memory."""


def retrieval_ranks(
    queries: Float[Tensor, "query width"],
    candidates: Float[Tensor, "candidate width"],
    right: Sequence[Sequence[int]],
) -> Int[Tensor, "query"]:
    """For each query, the number of wrong candidates that score at least as high as its best right one.

    `right` has the numbers of the right candidates of each query. A wrong candidate with the same score counts against
    the query, so that features that are all alike find nothing. The query's recall at k is whether its rank is below
    k. Raises UserError for features that are not finite, and for a query without a right candidate.
    """
    check_finite(queries, "a query")
    check_finite(candidates, "a candidate")
    if len(right) != len(queries) or not all(right):
        raise UserError("Each query needs at least one right candidate.")
    ranks: list[Tensor] = []
    for start in range(0, len(queries), _BLOCK):
        own = right[start : start + _BLOCK]
        scores = queries[start : start + _BLOCK].float() @ candidates.float().T
        is_right = torch.zeros(scores.shape, dtype=torch.bool)
        rows = torch.tensor([row for row, numbers in enumerate(own) for _ in numbers])
        is_right[rows, torch.tensor([number for numbers in own for number in numbers])] = True
        best = scores.masked_fill(~is_right, -torch.inf).amax(1, keepdim=True)
        ranks.append(((scores >= best) & ~is_right).sum(1))
    return torch.cat(ranks)


@dataclass(frozen=True)
class ClassAccuracy:
    """How many rows of which classes are predicted right."""

    right: Bool[Tensor, "row"]
    labels: Int[Tensor, "row"]

    @property
    def accuracy(self) -> float:
        """The share of all rows."""
        return self.right.double().mean().item()

    @property
    def mean_per_class(self) -> float:
        """The mean over classes of the share of a class's rows: rare classes count as much as frequent ones."""
        totals = torch.bincount(self.labels)
        shares = torch.bincount(self.labels[self.right], minlength=len(totals)) / totals.clamp(min=1).double()
        return shares[totals > 0].mean().item()

    def of_classes(self, classes: Sequence[int]) -> "ClassAccuracy":
        """The same of the rows of some classes."""
        chosen = torch.isin(self.labels, torch.tensor(classes))
        return ClassAccuracy(self.right[chosen], self.labels[chosen])


def check_finite(features: Tensor, subject: str) -> None:
    """Raises UserError for features with NaN or infinity, which every comparison would read as a hit or a miss."""
    broken = (~features.isfinite()).any(-1).sum().item()
    if broken:
        raise UserError(
            f"{broken:,} of {len(features):,} features of {subject} are not finite numbers, so that nothing can be "
            "measured. The training of the model diverged, or its type is too narrow: try --dtype float32."
        )
