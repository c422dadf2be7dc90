"""Whether a head and the hidden states that a server sends are of one model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmkd.errors import UserError
from mmkd.models.heads import LMHead

# Of the root mean square of states without the norm's scale: more is rounding of half types; less is the small number
# under the norm's root, which shows where states before it are small, in random models.
RMS_RANGE = (0.97, 1.003)
# Nats below those of a guess, which states and head of different models give, since they are certain of any token.
WORSE_THAN_GUESSING = 2.0
# Standard errors by which a head that fits prefers the row's tokens in their places.
SIGNIFICANT = 4.0


@dataclass(frozen=True)
class FinalNorm:
    """The scale and shift of the norm that a model's last hidden states have gone through.

    Without them a state has a root mean square of 1, which is so for no other model's scale.
    """

    scale: Float[Tensor, "width"]
    shift: Float[Tensor, "width"]

    @classmethod
    def of(cls, module: nn.Module, width: int) -> "FinalNorm | None":
        """What a norm does to a state, tried on two; None where it does something else, or the same to all numbers."""
        # Of mean 0 and alike in size, so that it does not matter whether the norm takes the mean off.
        signs = torch.ones(width).where(torch.arange(width) % 2 == 0, -1.0)
        large, opposite = module(100.0 * signs).float(), module(-100.0 * signs).float()
        scale, shift = (large - opposite) / 2 * signs, (large + opposite) / 2
        is_norm = torch.allclose(module(1000.0 * signs).float(), large, rtol=1e-2, atol=1e-3)
        varied = scale.std() > 1e-3 * scale.abs().mean()
        whole = scale.abs().min() > 1e-3 * scale.abs().max()
        return cls(scale, shift) if is_norm and varied and whole else None

    def root_mean_square(self, states: Float[Tensor, "token width"]) -> float:
        """The median over tokens; 1 of states that have gone through this norm."""
        return float(((states.float() - self.shift) / self.scale).square().mean(-1).sqrt().median())


@torch.no_grad()
def check_states(
    head: LMHead, norm: FinalNorm | None, ids: Sequence[int], states: Float[Tensor, "token width"], whose: str
) -> None:
    """Raises UserError where states of these tokens, each at its own, are of another model than the head.

    Models that differ in the last norm are told apart by it. Without a norm, or where it is as it was made, a head is
    refused that is surer of wrong tokens than a guess, and prefers neither the row's next tokens nor its own ones.
    That takes the tokens of a plain text.
    """
    width = head.weight.shape[1]
    if states.shape[1] != width:
        raise UserError(
            f"{whose} sends hidden states of {states.shape[1]} numbers, but the teacher's head multiplies {width}. "
            "The server runs another model: set `teacher` to the one that it serves.",
            because="meaning",
        )
    if norm is None and len(ids) < 2:
        return
    if norm is not None:
        rms, (low, high) = norm.root_mean_square(states.cpu()), RMS_RANGE
        if low <= rms <= high:
            return
        why = (
            f"divided by the scale of the teacher's last norm, the root mean square of its states is {rms:.4f}, not 1"
        )
    else:
        log_probs = head.log_probs(states.to(head.weight))
        label = float(log_probs[:-1].gather(1, torch.tensor(ids[1:], device=log_probs.device)[:, None]).mean())
        guess = -float(torch.tensor(float(head.vocab_size)).log())
        if label > guess - WORSE_THAN_GUESSING or _reads(log_probs, ids):
            return
        why = (
            f"multiplied with the teacher's head, its states give the tokens of a plain text {label:.1f} nats on "
            f"average, where a guess among {head.vocab_size:,} tokens gives {guess:.1f}"
        )
    raise UserError(
        f"{whose} runs another model than the teacher whose head was read here: {why}. Set `teacher` (and "
        "teacher_revision) to the model that is served, or serve the teacher.",
        because="meaning",
    )


def _reads(log_probs: Float[Tensor, "token vocab"], ids: Sequence[int]) -> bool:
    """Whether the row's tokens are likelier in their places, as the next token or the own one, than in others."""
    row = torch.tensor(ids, device=log_probs.device)
    table = log_probs[:, row]
    error = float(table.std()) / len(ids) ** 0.5
    return any(float(table.diagonal(offset).mean() - table.mean()) > SIGNIFICANT * error for offset in (0, 1))


@torch.no_grad()
def drift(head: LMHead, before: Float[Tensor, "token width"], now: Float[Tensor, "token width"]) -> float:
    """KL(before || now) of a head's distributions, nats per token."""
    first, second = (head.log_probs(states.to(head.weight)) for states in (before, now))
    return float((first.exp() * (first - second)).sum(-1).mean())
