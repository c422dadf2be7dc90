"""Prompts of classes: sets, files, means, and classes that no tokenizer tells apart."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mmkd.errors import UserError
from mmkd.models.class_prompts import check_class_prompts, class_features, load_prompts, prompt_sets
from mmkd.prepare.fashion_clip import build


def test_the_sets_that_ship() -> None:
    assert prompt_sets() == ["clip_7", "clip_80"]
    assert [len(load_prompts(name)) for name in prompt_sets()] == [7, 80]
    assert load_prompts("clip_7")[0] == "itap of a {}."


def test_a_file_has_one_template_per_line(tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("a drawing of a {}.\n\n{} on paper\n")
    assert load_prompts(str(own)) == ("a drawing of a {}.", "{} on paper")
    own.write_text("a drawing.\n")
    with pytest.raises(UserError, match=r"needs \{\} once"):
        load_prompts(str(own))
    with pytest.raises(UserError, match="did you mean 'clip_80'"):
        load_prompts("clip_81")


def test_a_class_is_the_mean_of_its_unit_prompts() -> None:
    known = {"a cat": [3.0, 0.0], "the cat": [0.0, 2.0], "a dog": [0.0, 1.0], "the dog": [0.0, 5.0]}
    features = class_features(
        lambda texts: torch.tensor([known[text] for text in texts]), ("cat", "dog"), ("a {}", "the {}"), batch_size=3
    )
    np.testing.assert_allclose(features, [[2**-0.5, 2**-0.5], [0.0, 1.0]], rtol=1e-6)


def test_classes_of_the_same_tokens_are_refused() -> None:
    tokenizer = build(("trouser", "bag"))[1].tokenizer

    def prepare(texts: Sequence[str]) -> dict[str, Tensor]:
        return dict(tokenizer(texts, padding=True, truncation=True, return_tensors="pt"))

    check_class_prompts(prepare, ("trouser", "bag"), ("a photo of a {}.",))
    with pytest.raises(UserError, match="'bag' and 'bag ' are the same tokens"):
        check_class_prompts(prepare, ("trouser", "bag", "bag "), ("a photo of a {}.", "a {} on a black background."))
    # Both are unknown words.
    with pytest.raises(UserError, match="'hat' and 'glove'"):
        check_class_prompts(prepare, ("hat", "glove"), ("a photo of a {}.",))
    # The prompt ends before the name begins.
    with pytest.raises(UserError, match="shorten the prompts"):
        check_class_prompts(prepare, ("trouser", "bag"), ("a photo of a " * 8 + "{}",))
