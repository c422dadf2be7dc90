"""What models write on held-out prompts: how long, whether they stop, how much they repeat; kept to be read."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmkd.data.prompts import Asked
from mmkd.data.prompts import model_inputs as _inputs
from mmkd.data.prompts import prompt_of as prompt_of
from mmkd.models.load import tokenizer_of


@dataclass(frozen=True)
class Answer:
    """One generation."""

    text: str
    tokens: int
    """Without the end-of-sequence token."""
    ended: bool
    repeated: float
    """Share of its 4-grams of tokens that were there before."""


@torch.no_grad()
def generate(
    model: Any,
    processing_class: Any,
    prompts: Sequence[Asked],
    max_new_tokens: int,
    batch_size: int = 8,
    tools: Sequence[Any] | None = None,
) -> list[Answer]:
    """Greedy answers to prompts as `prompt_of` makes them: messages go through the chat template."""
    tokenizer: Any = tokenizer_of(processing_class)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id} if ends is None else {*([ends] if isinstance(ends, int) else ends)}
    found: list[Answer] = []
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        own = None if tools is None else tools[batch]
        inputs = _inputs(processing_class, prompts[batch], own).to(model.device)
        ids = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        for row in ids[:, inputs["input_ids"].shape[1] :].tolist():
            found.append(_answer(row, ends, tokenizer))
    return found


def summary(answers: Sequence[Answer]) -> dict[str, float]:
    """Means over answers: tokens, characters, and the shares that ended by themselves, are empty, are repeated."""
    return {
        "answers": len(answers),
        "tokens": statistics.fmean(answer.tokens for answer in answers),
        "characters": statistics.fmean(len(answer.text) for answer in answers),
        "ended": statistics.fmean(answer.ended for answer in answers),
        "empty": statistics.fmean(not answer.text.strip() for answer in answers),
        "repeated": statistics.fmean(answer.repeated for answer in answers),
    }


def _answer(ids: list[int], ends: set[int], tokenizer: Any) -> Answer:
    stop = next((place for place, token in enumerate(ids) if token in ends), None)
    own = ids if stop is None else ids[:stop]
    grams = [tuple(own[place : place + 4]) for place in range(len(own) - 3)]
    repeated = 1 - len(set(grams)) / len(grams) if grams else 0.0
    return Answer(tokenizer.decode(own, skip_special_tokens=True), len(own), stop is not None, repeated)
