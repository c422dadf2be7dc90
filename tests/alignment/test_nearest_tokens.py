"""Nearest tokens: what is exact is exact, and the rest is near."""

import random

import numpy as np
import pytest

from mmkd.alignment.nearest_tokens import edit_distances, nearest_tokens


def edit_distance(left: bytes, right: bytes) -> int:
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def random_tokens(count: int, seed: int, longest: int = 9) -> list[bytes]:
    generator = random.Random(seed)
    return [bytes(generator.choices(b"abc\x00\xff", k=generator.randint(0, longest))) for _ in range(count)]


def test_edit_distances_are_those_of_the_textbook():
    left, right = random_tokens(500, 0), random_tokens(500, 1)
    expected = [edit_distance(a, b) for a, b in zip(left, right, strict=True)]
    assert edit_distances(left, right).tolist() == expected
    assert edit_distances([b" " * 100, b"", b" " * 60], [b" " * 103, b"abc", b""]).tolist() == [3, 3, 60]


@pytest.mark.parametrize("longest", [3, 9])
def test_tokens_at_distance_0_and_1_are_the_first_of_the_nearest(longest):
    student, teacher = random_tokens(300, 0, longest), random_tokens(400, 1, longest)
    nearest = nearest_tokens(student, teacher)
    assert nearest.dtype == np.int64
    near = 0
    for token, found in zip(student, nearest, strict=True):
        distances = [edit_distance(token, other) for other in teacher]
        if min(distances) <= 1:
            near += 1
            assert found == distances.index(min(distances))
        else:
            assert distances[found] <= min(distances) + 2
    assert near > 100


def test_neighbours_by_prefix_and_by_suffix_are_found_among_many():
    teacher = [f"{i:06d}".encode() for i in range(0, 1_000_000, 997)] + [b" distillation", b"unrelated"]
    nearest = nearest_tokens([b" distillations!", b"re-distillation", b"unrelated"], teacher)
    assert [teacher[index] for index in nearest] == [b" distillation", b" distillation", b"unrelated"]


def test_long_tokens_are_told_apart_by_length():
    assert nearest_tokens([b" " * 64, b"-" * 50], [b" " * 48, b" " * 60, b"-" * 8]).tolist() == [1, 2]


def test_repeated_tokens_map_alike_and_to_the_first():
    assert nearest_tokens([b"ab", b"abx", b"ab", b"abx"], [b"ab", b"ab"]).tolist() == [0, 0, 0, 0]
    assert nearest_tokens([], [b"a"]).tolist() == []


def test_an_empty_vocabulary_of_the_teacher_is_refused():
    with pytest.raises(ValueError, match="teacher's vocabulary is empty"):
        nearest_tokens([b"a"], [])
