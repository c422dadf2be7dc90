"""Chunk likelihoods: tokenkit's own numbers, the identities of the policies, and what happens at certainty."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mmkd.losses import chunks, divergences
from mmkd.losses.chunks import ChunkGroups, binarised, chunk_log_probs, group_chunks
from mmkd.losses.divergences import entropy, forward_kl, jsd, reverse_kl, tvd
from mmkd.losses.likelihood import token_log_probs
from mmkd.models.heads import LMHead

GOLDEN = Path(__file__).parents[1] / "golden"

ChunkLoss = Callable[[Tensor, Tensor], Tensor]
"""(student, teacher chunk log-probs) -> one value per chunk."""


# tokenkit's numbers


@dataclass
class Side:
    """One model's chunks of the golden batch, without those in which no token is scored."""

    log_probs: Tensor
    boundary: Tensor
    tokens: Tensor
    row: Tensor
    column_boundary: Tensor
    """As `boundary`, for all columns of tokenkit's matrix, 0 for those without tokens."""
    column_tokens: Tensor


def golden_side(golden: dict[str, Tensor], name: str, logits: Tensor, boundary_set: Tensor) -> Side:
    mask, ids = golden[f"loss_mask_{name}"], golden[f"{name}_ids"]
    membership = golden[f"{name}_tokens_to_chunks"] & mask[:, :, None]
    rows, length, vocab = logits.shape
    # Position n predicts token n + 1; what the last position predicts is in no chunk, but may be a boundary.
    labels = ids.roll(-1, dims=1)
    token_lp, boundary_lp = token_log_probs(
        logits.flatten(0, 1), LMHead(torch.eye(vocab)), labels.flatten(), boundary_set, chunk_size=4
    )
    scored = membership.clone()
    scored[:, 0] = False
    kept = scored.any(1).flatten()
    number = torch.where(kept, kept.cumsum(0) - 1, -1).reshape(rows, -1)
    of_token = torch.where(scored.any(-1), number.gather(1, scored.int().argmax(-1)), -1)
    predicted = of_token.roll(-1, dims=1)
    predicted[:, -1] = -1
    last = length - 1 - membership.flip(1).int().argmax(1)
    boundary = boundary_lp[torch.arange(rows)[:, None] * length + last]
    return Side(
        chunk_log_probs(token_lp, predicted.flatten(), int(kept.sum())),
        boundary.flatten()[kept],
        scored.sum(1).flatten()[kept],
        torch.arange(rows).repeat_interleave(membership.shape[-1])[kept],
        boundary.masked_fill(~membership.any(1), 0),
        scored.sum(1),
    )


def golden_case(boundary: str = "space") -> tuple[Side, Side, Tensor]:
    golden = {name: torch.tensor(values) for name, values in np.load(GOLDEN / "ALM_losses.npz").items()}
    logits = golden["student_logits"].requires_grad_()
    sides = []
    for name, values in (("student", logits), ("teacher", golden["teacher_logits"])):
        space = golden[f"space_mask_{name}"]
        # The golden tokenizers end a text with token 1.
        sides.append(
            golden_side(golden, name, values, space if boundary == "space" else torch.arange(len(space)) == 1)
        )
    return sides[0], sides[1], logits


def check_golden(name: str, loss: Tensor, student_logits: Tensor) -> None:
    golden = np.load(GOLDEN / "ALM_losses.npz")
    (gradient,) = torch.autograd.grad(loss, student_logits)
    np.testing.assert_allclose(loss.item(), golden[f"{name}__loss"], rtol=1e-5)
    np.testing.assert_allclose(gradient.numpy(), golden[f"{name}__grad"], rtol=1e-4, atol=1e-6)


def cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    return forward_kl(student, teacher) + entropy(teacher)


def tokenkit_binarised(divergence: chunks.Divergence, temperature: float) -> ChunkLoss:
    """tokenkit keeps its tempered log-probs 1e-6 away from 0."""
    away = 1e-6 * temperature
    return lambda student, teacher: binarised(student - away, teacher - away, divergence, temperature)


PLAIN: dict[str, ChunkLoss] = {
    "binary_kl_temp_limit": chunks.binary_kl_limit,
    "abs": chunks.absolute_difference,
    "renyi2": partial(binarised, divergence=divergences.renyi, temperature=1),
}
for tau in (1, 5, 100):
    PLAIN[f"binary_ce_tau{tau}"] = tokenkit_binarised(cross_entropy, tau)
    PLAIN[f"reverse_binary_kl_tau{tau}"] = tokenkit_binarised(reverse_kl, tau)
    PLAIN[f"abs_exp_tau{tau}"] = partial(binarised, divergence=tvd, temperature=tau)
    PLAIN[f"joschu_k2_tau{tau}"] = partial(chunks.joschu_k2, temperature=tau)
    PLAIN[f"joschu_k3_tau{tau}"] = partial(chunks.joschu_k3, temperature=tau)


@pytest.mark.parametrize("name", PLAIN)
def test_divergence_and_gradient_are_those_of_tokenkit(name):
    student, teacher, logits = golden_case()
    values = PLAIN[name](student.log_probs, teacher.log_probs)
    check_golden(f"plain_{name}", values.sum() / len(values), logits)


@pytest.mark.parametrize("temperature", [5, 100])
def test_debiased_chunks_are_those_of_tokenkit(temperature):
    loss, logits, groups, _ = debiased("unbiased", 0.0, temperature)
    check_golden(f"append_space_binary_ce_tau{temperature}", loss.sum() / len(groups), logits)


@pytest.mark.parametrize("threshold, correct", [(0.1, 0.25081), (0.3, 0.28740), (0.5, 0.35107)])
def test_merged_chunks_are_those_of_tokenkit_but_for_its_denominator(threshold, correct):
    loss, logits, groups, teacher = debiased("merge", threshold)
    assert len(loss) == len(groups)
    assert loss.mean().item() == pytest.approx(correct, rel=1e-4)
    count = tokenkit_count(teacher, threshold)
    assert count < len(groups)
    check_golden(f"merge_append_binary_ce_tau100_thr{threshold}", loss.sum() / count, logits)


def tokenkit_count(teacher: Side, threshold: float) -> int:
    """What tokenkit divides by: it merges the numbers of tokens twice, and loses groups of chunks by that.

    The loss comes out too large by a factor that grows with the merging.
    """
    ends = teacher.column_boundary.exp() > threshold
    group = ends.cumsum(1) - ends.int()
    tokens = teacher.column_tokens
    once = torch.zeros_like(tokens).scatter_add(1, group, tokens)
    twice = torch.zeros_like(tokens).scatter_add(1, group, once * (tokens > 0))
    return int((twice > 0).sum())


def debiased(
    policy: str, threshold: float, temperature: float = 100, boundary: str = "space"
) -> tuple[Tensor, Tensor, ChunkGroups, Side]:
    student, teacher, logits = golden_case(boundary)
    groups = group_chunks(policy, teacher.row, teacher.boundary, threshold)
    sides = (groups.log_probs(side.log_probs, side.boundary) for side in (student, teacher))
    return tokenkit_binarised(cross_entropy, temperature)(*sides), logits, groups, teacher


def test_losses_weighted_by_teacher_tokens_are_those_of_tokenkit():
    student, teacher, logits = golden_case()
    values = tokenkit_binarised(cross_entropy, 100)(student.log_probs, teacher.log_probs)
    check_golden("plain_token_count", (values * teacher.tokens).sum() / teacher.tokens.sum(), logits)
    values, logits, groups, teacher = debiased("merge", 0.3)
    tokens = chunk_log_probs(teacher.tokens.float(), groups.group, len(groups))
    check_golden("merge_append_tokencount", (values * tokens).sum() / tokens.sum(), logits)


def test_the_end_of_the_text_can_be_the_boundary():
    values, logits, groups, _ = debiased("unbiased", 0.0, boundary="end of text")
    check_golden("eos_as_space", values.sum() / len(groups), logits)


# Chunks and policies

ROW = torch.tensor([0, 0, 0, 2, 2, 2, 2, 5])
BOUNDARY = torch.tensor([0.05, 0.9, 0.05, 0.5, 0.1, 0.05, 0.2, 0.01])


def test_chunks_sum_their_tokens_and_leave_out_those_of_none():
    log_probs = torch.tensor([-1.0, -2.0, -torch.inf, -4.0, -8.0], requires_grad=True)
    chunk = torch.tensor([1, 1, -1, 2, 1])
    values = chunk_log_probs(log_probs, chunk, 4)
    assert values.tolist() == [0, -11, -4, 0]
    (gradient,) = torch.autograd.grad(values @ torch.tensor([9.0, 1, 2, 9]), log_probs)
    assert gradient.tolist() == [1, 1, 0, 2, 1]


@pytest.mark.parametrize("policy", ["all", "space"])
def test_plain_chunks_stay_as_they_are(policy):
    groups = group_chunks(policy, ROW)
    values = torch.arange(8.0)
    assert torch.equal(groups.log_probs(values, values), values)


def test_unbiased_leaves_out_improbable_ends_and_adds_the_boundary():
    groups = group_chunks("unbiased", ROW, BOUNDARY.log(), 0.15)
    assert groups.group.tolist() == [-1, 0, -1, 1, -1, -1, 2, -1]
    values, boundary = torch.arange(8.0), 10 * torch.arange(8.0)
    assert groups.log_probs(values, boundary).tolist() == [11, 33, 66]


def test_merge_continues_improbable_ends_within_the_row():
    groups = group_chunks("merge", ROW, BOUNDARY.log(), 0.15)
    assert groups.group.tolist() == [0, 0, 1, 2, 3, 3, 3, 4]
    values, boundary = torch.arange(8.0), 10 * torch.arange(8.0)
    assert groups.log_probs(values, boundary).tolist() == [11, 22, 33, 75, 77]
    assert len(groups) == 5


@pytest.mark.parametrize("policy", chunks.POLICIES)
def test_rows_in_one_batch_are_grouped_as_alone(policy):
    generator = torch.Generator().manual_seed(0)
    row = torch.arange(6).repeat_interleave(torch.tensor([3, 1, 7, 2, 9, 4]))
    boundary, values = -3 * torch.rand(2, len(row), generator=generator)
    together = group_chunks(policy, row, boundary, 0.3).log_probs(values, boundary)
    alone = [
        group_chunks(policy, row[row == i], boundary[row == i], 0.3).log_probs(values[row == i], boundary[row == i])
        for i in range(6)
    ]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("policy", ["unbiased", "merge"])
def test_without_a_threshold_every_chunk_is_an_item(policy):
    groups = group_chunks(policy, ROW, BOUNDARY.log(), 0.0)
    assert groups.group.tolist() == groups.last.tolist() == list(range(8))


def test_merging_never_changes_the_sum_of_the_log_likelihoods():
    values = -torch.arange(8.0)
    groups = group_chunks("merge", ROW, BOUNDARY.log(), 0.5)
    assert groups.log_probs(values, torch.zeros(8)).sum() == values.sum()


@pytest.mark.parametrize("policy", chunks.POLICIES)
def test_no_chunks_are_no_items_and_a_loss_of_zero(policy):
    nothing = torch.zeros(0, requires_grad=True)
    groups = group_chunks(policy, torch.zeros(0, dtype=torch.long), torch.zeros(0))
    values = groups.log_probs(chunk_log_probs(nothing, torch.zeros(0, dtype=torch.long), 0), nothing)
    loss = binarised(values, values.detach()).sum()
    assert len(groups) == 0
    assert loss == 0
    loss.backward()


def test_unknown_policies_and_missing_boundaries_are_refused():
    with pytest.raises(ValueError, match=r"policy 'some' is unknown; choose one of all, space, unbiased, merge"):
        group_chunks("some", ROW)
    with pytest.raises(ValueError, match="merge needs the teacher's probability of a boundary"):
        group_chunks("merge", ROW)


# Divergences of chunks

BINARISED: dict[str, ChunkLoss] = {
    f"{name}_{tau}": partial(binarised, divergence=divergence, temperature=tau)
    for tau in (1, 5, 100)
    for name, divergence in {
        "forward_kl": forward_kl,
        "reverse_kl": reverse_kl,
        "jsd": jsd,
        "tvd": tvd,
        "renyi_2": divergences.renyi,
        "renyi_half": partial(divergences.renyi, alpha=0.5),
        "renyi_1": partial(divergences.renyi, alpha=1),
    }.items()
}
LOSSES: dict[str, ChunkLoss] = BINARISED | {
    "limit": chunks.binary_kl_limit,
    "abs": chunks.absolute_difference,
    "k2": chunks.joschu_k2,
    "k3": chunks.joschu_k3,
}
EXTREMES = torch.tensor([0.0, -1e-30, -1e-9, -1e-7, -1e-4, -0.6931, -1, -30, -90, -1e4])


@pytest.mark.parametrize("name", LOSSES)
def test_certain_and_impossible_chunks_have_finite_losses_and_gradients(name):
    student, teacher = (x.flatten() for x in torch.meshgrid(EXTREMES, EXTREMES, indexing="ij"))
    student = student.clone().requires_grad_()
    values = LOSSES[name](student, teacher)
    assert values.isfinite().all()
    assert (values >= -1e-6).all()
    values.sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    # A student that finds the chunk much less likely than the teacher never learns to find it less likely still.
    assert (student.grad[student < teacher - 1] <= 1e-6).all()


@pytest.mark.parametrize("name", LOSSES)
def test_student_equal_to_teacher_has_no_loss_and_no_gradient(name):
    student = EXTREMES.clone().requires_grad_()
    values = LOSSES[name](student, EXTREMES)
    torch.testing.assert_close(values, torch.zeros_like(values), rtol=0, atol=1e-6)
    values.sum().backward()
    assert student.grad is not None
    # fp32 knows 1 - p only to a unit in the last place of p, and gradients by log p divide by it.
    torch.testing.assert_close(student.grad[4:], torch.zeros(len(EXTREMES) - 4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_of_a_chunk_loss_is_that_of_finite_differences(name):
    student = torch.tensor([-0.2, -1.5, -9.0], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([-0.9, -0.1, -7.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda values: LOSSES[name](values, teacher), student)


def test_high_temperatures_approach_the_limit():
    student, teacher = -20 * torch.rand(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    limit = chunks.binary_kl_limit(student, teacher)
    torch.testing.assert_close(1e7 * binarised(student, teacher, temperature=1e7), limit, rtol=1e-4, atol=1e-6)


def test_binarised_divergence_is_at_most_that_between_all_outcomes():
    student, teacher = 3 * torch.randn(2, 50, 7, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    for divergence in (forward_kl, reverse_kl, tvd, divergences.renyi):
        binary = binarised(student[:, 0], teacher[:, 0], divergence, temperature=1)
        assert (binary <= divergence(student, teacher) + 1e-6).all()


def test_remainders_are_exact_on_both_sides_of_one_half():
    log_probs = torch.linspace(-40, -1e-5, 2001)
    wide = log_probs.double()
    exact = torch.where(wide > -1, torch.log(-torch.expm1(wide)), torch.log1p(-wide.exp()))
    torch.testing.assert_close(divergences.log_one_minus_exp(log_probs).double(), exact, rtol=1e-6, atol=0)
    # A sum of log-probs may round to more than 0.
    assert divergences.log_one_minus_exp(torch.tensor([0.0, 1e-3])).isfinite().all()


def test_renyi_needs_a_positive_order():
    with pytest.raises(ValueError, match="alpha is 0"):
        divergences.renyi(torch.zeros(2), torch.zeros(2), alpha=0)
