"""What student and teachers read of rows of text, made of the tokens that they were prepared as."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import ProcessorMixin

from mmkd.teachers.batch import Batch, Reading, View

from .pairs import teacher_parts
from .row_views import RowView
from .teacher_prompts import prefixes_of


@dataclass(frozen=True)
class Rows:
    """The rows of a batch in the making."""

    examples: Sequence[Any]
    replaced: Mapping[int, str] = field(default_factory=dict)
    """Rows that stand in the place of bad ones, by number, with the kind in BAD_ROWS."""
    companion: bool = False
    """Whether the last row only keeps ranks together."""


@dataclass(frozen=True)
class TextViews:
    """Rows of tokens, of which student and teachers see the same, but for teachers with a prompt of their own.

    `collator` makes inputs and labels, `prefixes` begin the names of the columns with such teachers' tokens, by their
    names.
    """

    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    prefixes: Mapping[str, str] = field(default_factory=dict[str, str])

    def with_teachers(
        self,
        processors: Mapping[str, ProcessorMixin],
        served: Collection[str] = (),
        teacher_views: Mapping[str, RowView] | None = None,
    ) -> Self:
        """These, which are the teachers' too, but for those with views."""
        return replace(self, prefixes=prefixes_of({name: own.view for name, own in (teacher_views or {}).items()}))

    def reader(self, train: Any, sharded: bool, image_columns: Collection[str] = ()) -> None:
        """What decodes images: nothing, since there are none."""

    def __call__(self, rows: Rows) -> tuple[Rows, Batch]:
        # Collators write into their examples.
        view = View.of(self.collator([dict(example) for example in rows.examples]))
        read = {
            prefix: Reading(
                View.of(self.collator([part for row in rows.examples for part in teacher_parts(row, prefix)]))
            )
            for prefix in dict.fromkeys(self.prefixes.values())
        }
        readings = {name: read[prefix] for name, prefix in self.prefixes.items()}
        return rows, Batch(view, row_lengths(view, rows.examples), readings)


def row_lengths(view: View, examples: Sequence[Mapping[str, Any]]) -> Int[Tensor, "row"]:
    """How many tokens each row of a batch has, also where rows are laid end to end."""
    ids = view.inputs["input_ids"]
    flat = len(ids) != len(examples)
    return torch.tensor([len(example["input_ids"]) if flat else ids.shape[1] for example in examples])
