"""EM-KD: its terms against an implementation of it, and the distances by which visual tokens are matched."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmkd.losses import visual_alignment
from mmkd.losses.fused import fused_loss
from mmkd.losses.token_matching import matched
from mmkd.losses.visual_alignment import alignment_distance, logit_distances, squared_difference
from mmkd.models.heads import LMHead
from mmkd.teachers.signals import DenseSignal, RawSignal

GOLDEN: Any = np.load(Path(__file__).parents[1] / "golden" / "VISUAL_losses.npz")
STUDENT_VISUAL, TEACHER_VISUAL = 5, 8


def side(name: str) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(GOLDEN[f"em_{name}_hidden"]), torch.from_numpy(GOLDEN[f"em_{name}_head"])


def test_matching_and_terms_are_those_of_em_kd() -> None:
    (student, weight), (teacher, teacher_weight) = side("student"), side("teacher")
    student.requires_grad_()
    weight.requires_grad_()
    heads = LMHead(weight), LMHead(teacher_weight)
    visual, theirs = student[:STUDENT_VISUAL], teacher[:TEACHER_VISUAL]
    costs = logit_distances(visual, heads[0], theirs, heads[1])
    ours_at, theirs_at = matched(visual, theirs, lambda *states: costs)
    labels = torch.zeros(STUDENT_VISUAL, dtype=torch.long)
    targets = RawSignal(DenseSignal(theirs[theirs_at], heads[1]))
    fused = fused_loss(visual[ours_at], heads[0], labels, targets, squared_difference, chunk_size=2)
    vsd = fused.total / len(ours_at)
    assert vsd.item() == pytest.approx(GOLDEN["em_vsd"].item())
    gradients = torch.autograd.grad(vsd, (student, weight))
    torch.testing.assert_close(gradients[0], torch.from_numpy(GOLDEN["em_vsd__grad_hidden"]))
    torch.testing.assert_close(gradients[1], torch.from_numpy(GOLDEN["em_vsd__grad_head"]))
    text = student[STUDENT_VISUAL:], teacher[TEACHER_VISUAL:]
    vlad = alignment_distance(visual[ours_at], text[0], theirs[theirs_at], text[1])
    assert vlad.item() == pytest.approx(GOLDEN["em_vlad"].item())
    gradient = torch.autograd.grad(vlad, student)[0]
    torch.testing.assert_close(gradient, torch.from_numpy(GOLDEN["em_vlad__grad_hidden"]))


@pytest.mark.parametrize(("cost", "norm"), [("manhattan", 1), ("euclidean", 2)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_distances_are_those_of_logits_in_full(
    cost: str, norm: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visual_alignment, "_ROWS", 5)
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 4), torch.randn(6, 7)
    heads = [LMHead(torch.randn(15, w), torch.randn(15), 0.7, softcap).trimmed(13) for w in (4, 7)]
    logits = [
        head.finish(states @ head.weight[:13].T + head.bias[:13])
        for states, head in zip((student, teacher), heads, strict=True)
        if head.bias is not None
    ]
    expected = (logits[0][:, None] - logits[1][None]).norm(p=norm, dim=-1)
    found = logit_distances(student, heads[0], teacher, heads[1], cost)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="choose manhattan or euclidean"):
        logit_distances(student, heads[0], teacher, heads[1], "cosine")
