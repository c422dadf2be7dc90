"""A linear probe: logistic regression on frozen features, its regularisation chosen on validation rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from mmkd.errors import UserError

STRENGTHS = tuple(float(10.0**power) for power in range(-3, 5))
"""The values of C that are tried: the inverse of the weight of the L2 term."""

STEPS = 1000
"""At most so many steps of L-BFGS, as in CLIP."""


@dataclass(frozen=True)
class Probed:
    """What a probe says of test rows, and how it was chosen."""

    predictions: Int[ndarray, "row"]
    strength: float
    """The value of C that was chosen."""
    validation_accuracy: float


def linear_probe(
    train: tuple[Float[ndarray, "row width"], Int[ndarray, "row"]],
    validation: tuple[Float[ndarray, "held width"], Int[ndarray, "held"]],
    test: Float[ndarray, "tested width"],
    strengths: Sequence[float] = STRENGTHS,
) -> Probed:
    """The classes that a logistic regression on `train` predicts for the test rows.

    C is the one with the highest accuracy on the validation rows, of equals the smallest; the last fit is on train and
    validation together (2103.00020, appendix A.3). Raises UserError for features that are not finite, and for
    training rows of one class.
    """
    # Slow to import, and of this measure only.
    from sklearn.linear_model import LogisticRegression

    for features in (train[0], validation[0], test):
        if not np.isfinite(features).all():
            raise UserError("Features of the linear probe are not finite numbers. The training of the model diverged.")
    if len(np.unique(train[1])) < 2:
        raise UserError("A linear probe needs training rows of two classes or more.", because="meaning")

    def fitted(strength: float, features: ndarray, labels: ndarray) -> LogisticRegression:
        return LogisticRegression(C=strength, max_iter=STEPS).fit(features, labels)

    accuracies = [float(fitted(strength, *train).score(*validation)) for strength in strengths]
    best = max(range(len(strengths)), key=lambda number: accuracies[number])
    both = (np.concatenate(pair) for pair in zip(train, validation, strict=True))
    last = fitted(strengths[best], *both)
    return Probed(np.asarray(last.predict(test)), strengths[best], accuracies[best])
