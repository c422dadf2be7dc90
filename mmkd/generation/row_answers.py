"""A model that answers the prompts of rows, as those who download it will see it."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmkd.data.prompts import RowPrompt, model_inputs, pictures_of
from mmkd.errors import UserError
from mmkd.models.load import tokenizer_of
from mmkd.teachers.vllm_client import VLLMClient

from .generator import Prompt
from .local_generation import AnswerTokens, LocalGenerator, by_number, stops_of
from .served_generation import ServerGenerator

PromptWithTools = tuple[RowPrompt, Any]
"""A prompt as `prompt_of` makes it, and the descriptions of its tools or None."""


def row_generator(
    model: Any, processing_class: Any, batch_size: int = 8, own_settings: bool = True
) -> LocalGenerator[PromptWithTools]:
    """Answers prompts, by default with the model's own settings, a repetition penalty say.

    Messages go through the template.
    """
    tokenizer: Any = tokenizer_of(processing_class)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokens = AnswerTokens(stops_of(model) or [tokenizer.eos_token_id], [], tokenizer.pad_token_id)

    def inputs(asked: list[PromptWithTools]) -> Mapping[str, Any]:
        batch, tools = zip(*asked, strict=True)
        return model_inputs(processing_class, batch, None if all(own is None for own in tools) else tools)

    def batches(asked: Sequence[PromptWithTools]) -> list[list[int]]:
        return by_number(range(len(asked)), batch_size)

    return LocalGenerator(model, processing_class, inputs, batches, tokens, own_settings=own_settings)


def served_row_generator(client: VLLMClient, processing_class: Any) -> ServerGenerator[PromptWithTools]:
    """Answers prompts by servers. The processing class, which is that of the served model, makes their tokens."""

    def prompt_of(asked: PromptWithTools) -> Prompt:
        prompt, tools = asked
        images = pictures_of(prompt)
        if images and not isinstance(prompt, list):
            raise UserError("A server is asked about images through messages, and this prompt is plain text.")
        ids = model_inputs(processing_class, [prompt], [tools])["input_ids"][0].tolist()
        return Prompt(ids, prompt if images and isinstance(prompt, list) else None, images)

    return ServerGenerator(client, prompt_of)
