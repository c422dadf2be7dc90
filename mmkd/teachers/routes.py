"""Whom of several teachers the rows of a batch name."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mmkd.errors import UserError

from .batch import View


def teacher_names(example: Mapping[str, Any], column: str) -> list[Any]:
    """The teacher that a row names; of a packed row, the one of each of its sequences."""
    named = example.get(column)
    return [named] if named is None or isinstance(named, str) else list(named)


def route_of(
    view: View, examples: Sequence[Mapping[str, Any]], column: str, teachers: Sequence[str]
) -> Int[Tensor, "batch position"]:
    """The number of the teacher of each row, in one column; of each token, where rows lie end to end.

    Raises UserError for a row that names none of the teachers.
    """
    named = [teacher_names(example, column) for example in examples]
    for name in (name for names in named for name in names if name not in teachers):
        raise UserError(
            f"A row's {column} is {name!r}, which is none of the teachers ({', '.join(teachers)}). Name a teacher in "
            "every row, or leave such rows out of the data."
        )
    ids = view.inputs["input_ids"]
    numbers = [torch.tensor([teachers.index(name) for name in names]) for names in named]
    if len(ids) == len(examples) and not any(len(own) > 1 for own in numbers):
        return torch.stack([own[:1] for own in numbers])
    lengths = [example.get("seq_lengths") or [len(example["input_ids"])] for example in examples]
    routes = [
        own.repeat_interleave(torch.tensor(own_lengths)) for own, own_lengths in zip(numbers, lengths, strict=True)
    ]
    if len(ids) == len(examples):
        padded = torch.full_like(ids, -1)
        for row, route in enumerate(routes):
            padded[row, : len(route)] = route
        return padded
    route = torch.cat(routes)
    # Padding to a multiple, after the last of them, is nobody's.
    return torch.nn.functional.pad(route, (0, ids.shape[1] - len(route)), value=-1)[None]
