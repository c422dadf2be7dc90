"""What EM-KD (2511.21106) compares of visual tokens: their logits, and how near they are to the tokens of a text."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize, smooth_l1_loss

from mmkd.errors import UserError

from .projection import Head, starts

# The number of tokens of the vocabulary whose logits exist at a time.
_ROWS = 4096


@torch.no_grad()
def logit_distances(
    student: Float[Tensor, "student student_width"],
    student_head: Head,
    teacher: Float[Tensor, "teacher teacher_width"],
    teacher_head: Head,
    cost: str = "manhattan",
) -> Float[Tensor, "student teacher"]:
    """The Manhattan or Euclidean distance between the logits of each pair, in fp32 or better.

    A block of the vocabulary exists at a time. The Manhattan distance takes a subtraction per pair and token of the
    vocabulary, the Euclidean one a matrix product. Raises UserError for another cost.
    """
    if cost not in ("manhattan", "euclidean"):
        raise UserError(f"The cost {cost!r} is unknown; choose manhattan or euclidean.")
    wide = torch.promote_types(student.dtype, torch.float32)
    heads = [head.frozen(wide) for head in (student_head, teacher_head)]
    total = student.new_zeros(len(student), len(teacher), dtype=wide)
    with torch.autocast(student.device.type, enabled=False):
        for start in starts(student_head.vocab_size, _ROWS):
            rows = slice(start, start + _ROWS)
            ours, theirs = (
                _logits(states.to(wide), head, rows) for states, head in zip((student, teacher), heads, strict=True)
            )
            if cost == "manhattan":
                total += torch.cdist(ours, theirs, p=1)
            else:
                total += ours.square().sum(-1)[:, None] - 2 * ours @ theirs.T + theirs.square().sum(-1)
    return total if cost == "manhattan" else total.clamp(min=0).sqrt()


def _logits(states: Tensor, head: Head, rows: slice) -> Tensor:
    bias = None if head.bias is None else head.bias[rows]
    return head.finish(torch.nn.functional.linear(states, head.weight[rows], bias))


def squared_difference(
    student_logits: Float[Tensor, "*item outcome"], teacher_logits: Float[Tensor, "*item outcome"]
) -> Float[Tensor, "*item"]:
    """The mean over the vocabulary of the squared difference between logits: VSD, of one pair of visual tokens."""
    return (student_logits - teacher_logits).square().mean(-1)


def alignment_distance(
    student_visual: Float[Tensor, "visual student_width"],
    student_text: Float[Tensor, "text student_width"],
    teacher_visual: Float[Tensor, "visual teacher_width"],
    teacher_text: Float[Tensor, "text teacher_width"],
) -> Float[Tensor, ""]:
    """The smooth L1 distance of the cosines between visual tokens and text, student against teacher: VLAD.

    The mean over all pairs of a visual token and a token of text, in fp32 or better.
    """
    with torch.autocast(student_visual.device.type, enabled=False):
        wide = torch.promote_types(student_visual.dtype, torch.float32)
        student, teacher = (
            normalize(visual.to(wide), dim=-1) @ normalize(text.to(wide), dim=-1).T
            for visual, text in ((student_visual, student_text), (teacher_visual.detach(), teacher_text.detach()))
        )
        return smooth_l1_loss(student, teacher)
