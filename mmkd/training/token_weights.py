"""How much each token of the student's own answers counts."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmkd.errors import UserError
from mmkd.losses.likelihood import token_log_probs
from mmkd.losses.sampled_kl import prefix_importance
from mmkd.teachers.signals import DenseSignal, LabelSignal, MixedSignal, TopKSignal

from .items import Supervised


@torch.no_grad()
def importance_weights(student: Supervised, signal: Any, gamma: float, chunk_size: int) -> Float[Tensor, "token"]:
    """The weights of IW-OPD for the tokens that the student said itself, and 1 for others.

    The gap between teacher and student is that of the sampled tokens, by the student that sampled them. With several
    teachers it is that to the mean of their log-probs. Raises UserError for a teacher that does not tell these.
    """
    rollout, answers = student.rollout, student.answers
    assert rollout is not None
    assert answers is not None
    sampling = rollout.log_probs
    if sampling is None:
        sampling = token_log_probs(student.hidden, student.head, student.labels, chunk_size=chunk_size)[0]
    gaps = label_log_probs(signal, student, chunk_size) - sampling
    # What a teacher put in the place of the student's tokens has not strayed from it.
    weights = prefix_importance(gaps.where(rollout.own, 0), answers, gamma)
    return weights.where(rollout.own, 1)


def label_log_probs(signal: Any, student: Supervised, chunk_size: int) -> Float[Tensor, "token"]:
    """How likely the teacher finds the supervised tokens. Raises UserError where it does not tell."""
    if isinstance(signal, MixedSignal):
        parts = {name: label_log_probs(part, student, chunk_size) for name, part in signal.signals.items()}
        return torch.stack([signal.weights[name] * part for name, part in parts.items()]).sum(0)
    if isinstance(signal, DenseSignal):
        return token_log_probs(signal.hidden, signal.head, student.labels, chunk_size=chunk_size)[0]
    told = signal.log_probs if isinstance(signal, LabelSignal) else None
    if isinstance(signal, TopKSignal):
        told = signal.label_log_probs
    if told is None:
        raise UserError(
            "rollout_token_weights: importance needs the teacher's log-prob of each sampled token, which this teacher "
            "does not tell. Set rollout_token_weights: uniform or prefix, or use another teacher.",
            because="meaning",
        )
    return told.to(student.hidden.device)
