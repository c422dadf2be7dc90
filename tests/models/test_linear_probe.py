"""The linear probe: its choice, and what it predicts, against scikit-learn called by hand."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from mmkd.errors import UserError
from mmkd.models.linear_probe import linear_probe


def rows(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    return np.eye(3)[labels] + random.normal(scale=0.8, size=(count, 3)), labels


def test_the_strength_is_chosen_on_validation_rows() -> None:
    train, validation, (test, _) = rows(60, 0), rows(90, 1), rows(40, 2)
    probed = linear_probe(train, validation, test, (1e-3, 1.0))
    scores = {c: LogisticRegression(C=c, max_iter=1000).fit(*train).score(*validation) for c in (1e-3, 1.0)}
    assert scores[1e-3] != scores[1.0]
    assert probed.strength == max(scores, key=lambda c: scores[c])
    assert probed.validation_accuracy == max(scores.values())
    both = (np.concatenate(pair) for pair in zip(train, validation, strict=True))
    np.testing.assert_array_equal(
        probed.predictions, LogisticRegression(C=probed.strength, max_iter=1000).fit(*both).predict(test)
    )


def test_rows_that_teach_nothing_are_refused() -> None:
    features, labels = rows(12, 0)
    with pytest.raises(UserError, match="two classes or more"):
        linear_probe((features, np.zeros(12)), (features, labels), features)
    with pytest.raises(UserError, match="not finite"):
        linear_probe((features * np.nan, labels), (features, labels), features)
