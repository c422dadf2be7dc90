"""Which visual token of the student belongs to which of the teacher's, where the two sides cut an image differently.

The assignment of the least total cost (the Hungarian problem), as in EM-KD (2511.21106). The side with fewer tokens
has all of them matched, each with another token of the other side; the tokens that are left over are not compared.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmkd.errors import UserError

Cost = Callable[[Tensor, Tensor], Tensor]
"""(student tokens [student, width], teacher tokens [teacher, width]) -> cost of each pair [student, teacher]."""


def manhattan(
    student: Float[Tensor, "student width"], teacher: Float[Tensor, "teacher width"]
) -> Float[Tensor, "student teacher"]:
    """The L1 distance of each pair, which EM-KD takes between logits."""
    return torch.cdist(student, teacher, p=1)


def euclidean(
    student: Float[Tensor, "student width"], teacher: Float[Tensor, "teacher width"]
) -> Float[Tensor, "student teacher"]:
    """The L2 distance of each pair."""
    return torch.cdist(student, teacher, p=2)


def cosine_distance(
    student: Float[Tensor, "student width"], teacher: Float[Tensor, "teacher width"]
) -> Float[Tensor, "student teacher"]:
    """1 - cos of each pair, in [0, 2]."""
    return 1 - torch.nn.functional.normalize(student, dim=-1) @ torch.nn.functional.normalize(teacher, dim=-1).T


COSTS: dict[str, Cost] = {"manhattan": manhattan, "euclidean": euclidean, "cosine": cosine_distance}


@torch.no_grad()
def matched(
    student: Float[Tensor, "student width"], teacher: Float[Tensor, "teacher width"], cost: Cost | str = "manhattan"
) -> tuple[Int[Tensor, "pair"], Int[Tensor, "pair"]]:
    """The tokens of the least total cost as (student's, teacher's), in the student's order, without gradient.

    There are as many pairs as the side with fewer tokens has. `cost` is a name in COSTS or a function. Raises
    UserError for an unknown name, for sides of different width, and for a cost that is NaN or infinite.
    """
    if isinstance(cost, str) and cost not in COSTS:
        raise UserError(f"The cost {cost!r} is unknown; choose one of {', '.join(COSTS)}.")
    if isinstance(cost, str) and student.shape[-1] != teacher.shape[-1]:
        raise UserError(
            f"Visual tokens of {student.shape[-1]} and {teacher.shape[-1]} numbers have no {cost} distance. Compare "
            "their logits, or project one side to the width of the other first.",
            because="meaning",
        )
    pair_cost = COSTS[cost] if isinstance(cost, str) else cost
    with torch.autocast(student.device.type, enabled=False):
        wide = torch.promote_types(student.dtype, torch.float32)
        costs = pair_cost(student.to(wide), teacher.to(student.device, wide))
    return assigned(costs)


def assigned(costs: Float[Tensor, "student teacher"]) -> tuple[Int[Tensor, "pair"], Int[Tensor, "pair"]]:
    """The pairs of the least total cost, in the student's order. Raises UserError for a cost that is not finite."""
    if not costs.isfinite().all():
        raise UserError(
            "A distance between visual tokens is not finite: the hidden states of the student or the teacher hold NaN "
            "or infinity. In fp16 activations may overflow; use bf16 or fp32."
        )
    # Here, because losses are imported by every run, and few of them match tokens.
    from scipy import optimize  # pyright: ignore[reportMissingTypeStubs]

    rows, columns = cast(Any, optimize).linear_sum_assignment(costs.detach().cpu().numpy())
    return torch.as_tensor(rows, device=costs.device), torch.as_tensor(columns, device=costs.device)


def matched_by_image(
    student: Float[Tensor, "student width"],
    student_tokens: Sequence[int],
    teacher: Float[Tensor, "teacher width"],
    teacher_tokens: Sequence[int],
    cost: Cost | str = "manhattan",
    ordered: bool = False,
) -> tuple[Int[Tensor, "pair"], Int[Tensor, "pair"]]:
    """As `matched`, image by image: image i has the next `student_tokens[i]` and `teacher_tokens[i]` rows.

    The pairs are those of all images in their order. An image with as many tokens on both sides is matched too, or
    keeps its order if `ordered`.
    """
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    first = [0, 0]
    images = zip(torch.split(student, list(student_tokens)), torch.split(teacher, list(teacher_tokens)), strict=True)
    for sides in images:
        same = torch.arange(len(sides[0]), device=student.device)
        pair = (same, same) if ordered and len(sides[0]) == len(sides[1]) else matched(*sides, cost)
        for places, offset, rows in zip((ours, theirs), first, pair, strict=True):
            places.append(rows + offset)
        first = [offset + len(side) for offset, side in zip(first, sides, strict=True)]
    none = torch.zeros(0, dtype=torch.long, device=student.device)
    return torch.cat([none, *ours]), torch.cat([none, *theirs])
