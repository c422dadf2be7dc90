"""Hard negatives of a teacher: which are chosen, limits in which the losses are known ones, and gradients."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from mmkd.errors import UserError
from mmkd.losses.hard_negatives import (
    difficulty,
    dynamic_weights,
    hard_contrastive,
    hard_feature_contrast,
    hard_kl,
    hardest,
    pair_features,
)

ROWS = torch.arange(5)
DIAGONAL = torch.eye(5, dtype=torch.bool)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_teacher_chooses_what_it_scores_highest_but_no_positive() -> None:
    scores = torch.tensor([[9.0, 1.0, 8.0, 7.0], [0.0, 5.0, 5.0, 2.0]])
    positive = torch.tensor([[True, False, True, False], [False, True, False, False]])
    chosen = hardest(scores, positive, 3)
    assert chosen.items[0, :2].tolist() == [3, 1]
    assert chosen.present.tolist() == [[True, True, False], [True, True, True]]
    assert chosen.items[1].tolist() == [2, 3, 0]
    assert chosen.of(scores)[0].tolist() == [7, 1, -torch.inf]
    with pytest.raises(UserError, match="must be 1 or more"):
        hardest(scores, positive, 0)


def test_with_all_negatives_the_hard_loss_is_info_nce_and_with_fewer_it_is_less() -> None:
    scores, teacher = random(5, 5), random(5, 5, seed=1)
    losses = [hard_contrastive(scores, ROWS, hardest(teacher, DIAGONAL, count)) for count in (1, 2, 4, 9)]
    torch.testing.assert_close(losses[2], cross_entropy(scores, ROWS, reduction="none"))
    torch.testing.assert_close(losses[3], losses[2])
    assert (losses[0] < losses[1]).all()
    assert (losses[1] < losses[2]).all()


def test_hard_kl_is_none_for_equal_scores_and_the_full_kl_with_all_negatives() -> None:
    scores, teacher = random(5, 5), random(5, 5, seed=1)
    some, everything = hardest(teacher, DIAGONAL, 2), hardest(teacher, DIAGONAL, 4)
    # What all scores of a row share changes no distribution.
    torch.testing.assert_close(hard_kl(teacher + 3, teacher, ROWS, some), torch.zeros(5, dtype=torch.float64))
    assert (hard_kl(scores, teacher, ROWS, some) > 0).all()
    full = teacher.softmax(-1) * (teacher.log_softmax(-1) - scores.log_softmax(-1))
    torch.testing.assert_close(hard_kl(scores, teacher, ROWS, everything), full.sum(-1))


def test_feature_contrast_finds_the_pair_among_the_hard_ones() -> None:
    candidates, present = random(5, 4, 8), torch.ones(5, 4, dtype=torch.bool)
    same = candidates[:, 0] * 2.5
    torch.testing.assert_close(
        hard_feature_contrast(same, candidates, present, 0.01), torch.zeros(5, dtype=torch.float64), atol=1e-6, rtol=0
    )
    other = hard_feature_contrast(candidates[:, 1], candidates, present, 0.05)
    assert (other > 1).all()
    alone = torch.zeros_like(present)
    alone[:, 0] = True
    assert (hard_feature_contrast(candidates[:, 1], candidates, alone, 0.05) == 0).all()


def test_rows_without_negatives_cost_nothing_and_have_finite_gradients() -> None:
    scores, teacher = random(5, 5).requires_grad_(), random(5, 5, seed=1)
    nothing = hardest(teacher, torch.ones(5, 5, dtype=torch.bool), 2)
    total = hard_contrastive(scores, ROWS, nothing).sum() + hard_kl(scores, teacher, ROWS, nothing).sum()
    total.backward()
    assert total.item() == 0
    assert scores.grad is not None
    assert (scores.grad == 0).all()


def test_gradients_are_right_and_none_reaches_the_teacher() -> None:
    scores, teacher, features = random(5, 5).requires_grad_(), random(5, 5, seed=1), random(5, 6, seed=2)
    candidates = random(5, 3, 6, seed=3).requires_grad_()
    chosen = hardest(teacher, DIAGONAL, 2)
    assert torch.autograd.gradcheck(lambda x: hard_contrastive(x, ROWS, chosen), scores)
    assert torch.autograd.gradcheck(lambda x: hard_kl(x, teacher, ROWS, chosen), scores)
    present = torch.ones(5, 3, dtype=torch.bool)
    contrast = hard_feature_contrast(features.requires_grad_(), candidates, present, 0.5)
    assert torch.autograd.grad(contrast.sum(), candidates, allow_unused=True) == (None,)
    assert torch.autograd.gradcheck(lambda x: hard_feature_contrast(x, candidates, present, 0.5), features)


def test_dynamic_weights_have_the_mean_one_and_order_rows_by_their_loss() -> None:
    losses = torch.tensor([0.0, 0.5, 1.0, 4.0], requires_grad=True)
    assert dynamic_weights(losses, 0).tolist() == [1, 1, 1, 1]
    harder, easier = dynamic_weights(losses, 1.0), dynamic_weights(losses[1:], -1.0)
    torch.testing.assert_close(harder, losses.detach() / losses.detach().mean(), atol=1e-6, rtol=1e-6)
    assert easier.argsort().tolist() == [2, 1, 0]
    assert easier.mean().item() == pytest.approx(1)
    assert not harder.requires_grad
    assert dynamic_weights(torch.zeros(3), -2.0).tolist() == [1, 1, 1]
    # Two ranks that know the mean of both weigh as one that has all rows.
    parts = torch.cat([dynamic_weights(part, 2.0, difficulty(losses, 2.0).mean()) for part in losses.split(2)])
    torch.testing.assert_close(parts, dynamic_weights(losses, 2.0))


def test_the_feature_of_a_pair_sums_to_its_cosine() -> None:
    images, texts = random(3, 4), random(3, 4, seed=1)
    cosines = (normalize(images, dim=-1) * normalize(texts, dim=-1)).sum(-1)
    torch.testing.assert_close(pair_features(images, texts).sum(-1).double(), cosines, rtol=1e-5, atol=1e-6)
