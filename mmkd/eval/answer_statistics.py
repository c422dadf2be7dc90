"""What models write on held-out prompts: how long, whether they stop, how much they repeat; kept to be read."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmkd.data.prompts import RowPrompt
from mmkd.generation.generator import Answer, RowError, Sampling
from mmkd.generation.row_answers import row_generator
from mmkd.training.rollout_signs import repeated_share


@dataclass(frozen=True)
class AnswerStatistics:
    """Of one answer."""

    text: str
    tokens: int
    """Without the end-of-sequence token."""
    ended: bool
    repeated: float
    """Share of its 4-grams of tokens that were there before."""

    @classmethod
    def of(cls, answer: Answer, tokenizer: Any) -> "AnswerStatistics":
        ended = answer.finish_reason == "stop"
        own = answer.ids[:-1] if ended else answer.ids
        return cls(tokenizer.decode(own, skip_special_tokens=True), len(own), ended, repeated_share(own))


def greedy_answers(
    model: Any,
    processing_class: Any,
    prompts: Sequence[RowPrompt],
    max_new_tokens: int,
    batch_size: int = 8,
    tools: Sequence[Any] | None = None,
) -> list[AnswerStatistics]:
    """Greedy answers to prompts as `prompt_of` makes them: messages go through the chat template.

    The model answers as those who download it will see it: with its own settings, a repetition penalty say.
    """
    generator = row_generator(model, processing_class, batch_size)
    asked = list(zip(prompts, tools or [None] * len(prompts), strict=True))
    found = []
    for answers in generator.generate(asked, Sampling(max_new_tokens)):
        assert not isinstance(answers, RowError), "a model in this process refuses nothing"
        found.append(AnswerStatistics.of(answers[0], generator.tokenizer))
    return found


def summary(answers: Sequence[AnswerStatistics]) -> dict[str, float]:
    """Means over answers: tokens, characters, and the shares that ended by themselves, are empty, are repeated."""
    return {
        "answers": len(answers),
        "tokens": statistics.fmean(answer.tokens for answer in answers),
        "characters": statistics.fmean(len(answer.text) for answer in answers),
        "ended": statistics.fmean(answer.ended for answer in answers),
        "empty": statistics.fmean(not answer.text.strip() for answer in answers),
        "repeated": statistics.fmean(answer.repeated for answer in answers),
    }
