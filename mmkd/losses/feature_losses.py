"""Distances between what two modules compute of the same items: pure functions of two tensors, reduced by the caller.

Each is computed in fp32 or better under any autocast. A feature of the teacher is a constant: detach it.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .visual_relations import relation_distance, relations


def mse(student: Float[Tensor, "item width"], teacher: Float[Tensor, "item width"]) -> Float[Tensor, "item"]:
    """The mean over the width of the squared difference (FitNets, 1412.6550)."""
    student, teacher = _wide(student, teacher)
    return (student - teacher).square().mean(-1)


def cosine(student: Float[Tensor, "item width"], teacher: Float[Tensor, "item width"]) -> Float[Tensor, "item"]:
    """1 - cos, in [0, 2]; 1 where a feature is zero."""
    student, teacher = _wide(student, teacher)
    return 1 - torch.nn.functional.cosine_similarity(student, teacher, dim=-1)


def relation(
    student: Float[Tensor, "item width1"],
    teacher: Float[Tensor, "item width2"],
    sizes: Sequence[int],
    *,
    normalized: bool = True,
) -> Float[Tensor, "group"]:
    """1 - cos of how the items of a group relate to each other: the next `sizes[i]` items are group i.

    A group is an image or a row. The relation of two items is their correlation, or with `normalized=False` their
    product, in which items with a large norm dominate.
    """
    ours, theirs = (relations(features, sizes, normalized=normalized) for features in (student, teacher))
    distances = [relation_distance(pair[0], pair[1]) for pair in zip(ours, theirs, strict=True)]
    return torch.stack(distances) if distances else student.new_zeros(0, dtype=torch.float32)


def attention(
    student: Float[Tensor, "item head1 key"], teacher: Float[Tensor, "item head2 key"]
) -> Float[Tensor, "item"]:
    """KL(teacher || student) in nats of what each item attends to, of distributions averaged over the heads.

    As many heads on both sides are compared head by head instead, and averaged after that (MiniLM, 2002.10957).
    """
    student, teacher = _wide(student, teacher)
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    # Of keys that are masked both probabilities are 0: they add nothing, and log(0) must not be formed.
    tiny = torch.finfo(student.dtype).tiny
    log_ratio = teacher.clamp(min=tiny).log() - student.clamp(min=tiny).log()
    return (teacher * log_ratio).sum(-1).mean(-1)


def attention_mse(
    student: Float[Tensor, "item head1 key"], teacher: Float[Tensor, "item head2 key"]
) -> tuple[Float[Tensor, "item"], Float[Tensor, "item"]]:
    """Squared differences of what each item attends to, summed over heads and keys, and how many entries these are.

    Entries are those that are not 0 of the teacher, which masked keys are (BiStil, ACL Findings 2023). Different
    numbers of heads are averaged on both sides first.
    """
    student, teacher = _wide(student, teacher)
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    attended = teacher != 0
    return ((student - teacher).square() * attended).sum((-2, -1)), attended.sum((-2, -1)).to(student.dtype)


def _wide(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in fp32 or better, on the student's device."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    return student.to(dtype), teacher.to(student.device, dtype)
