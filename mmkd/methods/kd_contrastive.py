"""kd with a divergence for the data's answers and another one for the student's own (DistiLLM-2, 2503.07067)."""

from typing import Any

from jaxtyping import Bool
from torch import Tensor

from mmkd.errors import UserError
from mmkd.teachers.batch import Batch
from mmkd.teachers.signals import DenseSignal, SparseSignal

CONTRASTIVE = "contrastive"
ROLLOUT_TOKEN = "rollout_token"
"""The kind of item of the student's own tokens, which have a count of their own."""


def check_contrastive(args: Any) -> None:
    """Raises UserError for a contrast without answers of the student's own."""
    if args.divergence == CONTRASTIVE and not args.on_policy_fraction:
        raise UserError(
            "divergence: contrastive contrasts the data's answers with the student's own, and with "
            "on_policy_fraction: 0 there are none of these. Set on_policy_fraction: 1 and rollout_rows: add, or "
            "divergence: skew_kl.",
            because="meaning",
        )
    if args.divergence == CONTRASTIVE and args.on_policy_fraction == 1 and args.rollout_rows == "replace":
        raise UserError(
            "divergence: contrastive contrasts the data's answers with the student's own, which replace all of them "
            "with on_policy_fraction: 1. Set rollout_rows: add, which keeps both, or divergence: skew_reverse_kl.",
            because="meaning",
        )


def own_share(args: Any, step: int, max_steps: int) -> float:
    """The share of the student's own answers in the loss of a step: it ends to move half-way through the run."""
    start, end = args.contrastive_share, args.contrastive_share_end
    return start if end is None else start + (end - start) * min(1.0, 2 * step / max(1, max_steps))


def counts_of(batch: Batch) -> dict[str, Tensor]:
    """How many supervised tokens of the data's answers a micro-batch has, and how many of the student's own."""
    supervised, own = batch.student.supervised, batch.student.own
    return {"token": (supervised & ~own).sum(), ROLLOUT_TOKEN: own.sum()}


def signal_at(signal: DenseSignal | SparseSignal, tokens: Bool[Tensor, "token"]) -> Any:
    """What a teacher says of some of the tokens."""
    return DenseSignal(signal.hidden[tokens], signal.head) if isinstance(signal, DenseSignal) else signal[tokens]
