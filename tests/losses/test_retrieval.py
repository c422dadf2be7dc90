"""Ranks of images and texts, against the same numbers written in plain numpy."""

import numpy as np
import pytest
import torch

from mmkd.errors import UserError
from mmkd.losses.retrieval import ClassAccuracy, retrieval_ranks


def test_ranks_are_those_of_a_plain_sort() -> None:
    random = np.random.default_rng(0)
    queries, candidates = random.normal(size=(700, 8)), random.normal(size=(90, 8))
    right = [sorted(random.choice(90, size=1 + row % 3, replace=False).tolist()) for row in range(700)]
    ours = retrieval_ranks(torch.tensor(queries), torch.tensor(candidates), right)
    order = np.argsort(-(queries @ candidates.T), axis=1)
    for row, numbers in enumerate(right):
        assert ours[row] == next(place for place, item in enumerate(order[row]) if item in numbers)


def test_one_of_several_captions_is_enough() -> None:
    pictures, texts = torch.eye(2), torch.tensor([[0.0, 0.1], [1.0, 0.0], [0.0, 1.0]])
    assert retrieval_ranks(pictures, texts, [[0, 1], [2]]).tolist() == [0, 0]
    assert retrieval_ranks(pictures, texts, [[0], [2]]).tolist() == [2, 0]


def test_features_that_are_all_alike_find_nothing() -> None:
    same = torch.ones(5, 4)
    assert retrieval_ranks(same, same, [[row] for row in range(5)]).tolist() == [4] * 5


def test_numbers_that_are_none_are_refused() -> None:
    broken = torch.tensor([[1.0, float("nan")], [0.0, 1.0]])
    with pytest.raises(UserError, match="1 of 2 features of a candidate are not finite"):
        retrieval_ranks(torch.eye(2), broken, [[0], [1]])
    with pytest.raises(UserError, match="at least one right candidate"):
        retrieval_ranks(torch.eye(2), torch.eye(2), [[0], []])


def test_rare_classes_count_as_much_as_frequent_ones() -> None:
    right = torch.tensor([True, True, True, False])
    told = ClassAccuracy(right, torch.tensor([0, 0, 0, 1]))
    assert (told.accuracy, told.mean_per_class) == (0.75, 0.5)
    assert told.of_classes([1]).accuracy == 0
