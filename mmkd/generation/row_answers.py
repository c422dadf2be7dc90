"""A model that answers the prompts of rows, as those who download it will see it."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmkd.data.prompts import RowPrompt, model_inputs
from mmkd.models.load import tokenizer_of

from .local_generation import AnswerTokens, LocalGenerator, by_number, stops_of

PromptWithTools = tuple[RowPrompt, Any]
"""A prompt as `prompt_of` makes it, and the descriptions of its tools or None."""


def row_generator(model: Any, processing_class: Any, batch_size: int = 8) -> LocalGenerator[PromptWithTools]:
    """Answers prompts with the model's own settings, a repetition penalty say. Messages go through the template."""
    tokenizer: Any = tokenizer_of(processing_class)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokens = AnswerTokens(stops_of(model) or [tokenizer.eos_token_id], [], tokenizer.pad_token_id)

    def inputs(asked: list[PromptWithTools]) -> Mapping[str, Any]:
        batch, tools = zip(*asked, strict=True)
        return model_inputs(processing_class, batch, None if all(own is None for own in tools) else tools)

    def batches(asked: Sequence[PromptWithTools]) -> list[list[int]]:
        return by_number(range(len(asked)), batch_size)

    return LocalGenerator(model, processing_class, inputs, batches, tokens, own_settings=True)
