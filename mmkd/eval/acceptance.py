"""Speculative decoding: how many tokens of a draft a target model keeps (Leviathan et al. 2023, 2211.17192)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mmkd.errors import UserError


def acceptance(
    draft_log_probs: Float[Tensor, "token outcome"], target_log_probs: Float[Tensor, "token outcome"]
) -> Float[Tensor, "token"]:
    """The probability that a token drawn from the draft is kept: the sum of the smaller probabilities, 1 - TVD."""
    return torch.minimum(draft_log_probs, target_log_probs).exp().sum(-1)


def tokens_per_pass(rate: float, draft_tokens: int) -> float:
    """Tokens per pass of the target where every token of a draft is kept at the same rate, independently of others.

    (1 - rate^(n+1)) / (1 - rate) for n draft tokens (2211.17192, eq. 1): those kept, and one of the target's own.
    """
    _check(draft_tokens)
    return sum(rate**kept for kept in range(draft_tokens + 1))


def measured_tokens_per_pass(ratios: Sequence[Float[Tensor, "token"]], draft_tokens: int) -> float:
    """Tokens per pass of the target, from texts that the target has sampled; NaN for texts shorter than a draft.

    `ratios` are, for each text, min(1, draft / target) of each of its tokens. For a text x of the target, the product
    of the first k of them has as its mean the probability that k tokens of a draft are kept:
    sum_x target(x) min(1, draft(x_1) / target(x_1)) ... = sum_x min(draft, target)(x_1) .... Greedy decoding is the
    same with 1 where both models have the same most likely token and 0 elsewhere. Every place of a text that a whole
    draft fits behind counts.
    """
    _check(draft_tokens)
    kept, places = 0.0, 0
    for ratio in ratios:
        if len(ratio) < draft_tokens:
            continue
        windows = ratio.double().unfold(0, draft_tokens, 1)
        kept += windows.cumprod(-1).sum().item()
        places += len(windows)
    return 1 + kept / places if places else float("nan")


def _check(draft_tokens: int) -> None:
    if draft_tokens < 1:
        raise UserError(f"A draft of {draft_tokens} tokens drafts nothing; give 1 or more.")
