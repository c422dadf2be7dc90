"""Visual tokens of unequal number, matched by the least total cost."""

from itertools import permutations

import pytest
import torch

from mmkd.losses.token_matching import COSTS, matched, matched_by_image


@pytest.mark.parametrize("cost", sorted(COSTS))
@pytest.mark.parametrize("sizes", [(3, 5), (5, 3), (4, 4), (1, 4), (0, 3)])
def test_the_total_cost_is_the_least_of_all_assignments(sizes: tuple[int, int], cost: str) -> None:
    torch.manual_seed(0)
    student, teacher = (torch.randn(size, 6) for size in sizes)
    ours, theirs = matched(student, teacher, cost)
    costs = COSTS[cost](student, teacher)
    few, many = min(sizes), max(sizes)
    flat = costs if sizes[0] <= sizes[1] else costs.T
    least = min(sum(flat[row, column].item() for row, column in enumerate(p)) for p in permutations(range(many), few))
    assert costs[ours, theirs].sum().item() == pytest.approx(least, abs=1e-5)
    assert len(ours) == few == len(set(ours.tolist())) == len(set(theirs.tolist()))
    assert ours.tolist() == sorted(ours.tolist())


def test_permuted_tokens_find_each_other() -> None:
    torch.manual_seed(0)
    teacher = torch.randn(9, 4, dtype=torch.bfloat16)
    order = torch.randperm(9)
    ours, theirs = matched(teacher[order].requires_grad_(), teacher)
    assert ours.tolist() == list(range(9))
    assert theirs.equal(order)


def test_images_are_matched_each_for_itself() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(7, 3), torch.randn(9, 3)
    ours, theirs = matched_by_image(student, [3, 4], teacher, [6, 3])
    first, second = matched(student[:3], teacher[:6]), matched(student[3:], teacher[6:])
    assert ours.tolist() == [*first[0].tolist(), *(second[0] + 3).tolist()]
    assert theirs.tolist() == [*first[1].tolist(), *(second[1] + 6).tolist()]
    assert [len(part) for part in matched_by_image(student[:0], [], teacher[:0], [])] == [0, 0]


def test_a_cost_may_be_a_function() -> None:
    costs = torch.tensor([[5.0, 1.0], [1.0, 5.0], [0.0, 9.0]])
    ours, theirs = matched(torch.zeros(3, 2), torch.zeros(2, 7), lambda student, teacher: costs)
    assert list(zip(ours.tolist(), theirs.tolist(), strict=True)) == [(0, 1), (2, 0)]


@pytest.mark.parametrize(
    ("student", "cost", "message"),
    [
        (torch.zeros(2, 3), "manhattan", "Visual tokens of 3 and 4 numbers have no manhattan distance"),
        (torch.zeros(2, 4), "hamming", "choose one of manhattan, euclidean, cosine"),
        (torch.full((2, 4), torch.nan), "euclidean", "is not finite"),
    ],
)
def test_what_has_no_cost_is_refused(student: torch.Tensor, cost: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        matched(student, torch.zeros(2, 4), cost)
