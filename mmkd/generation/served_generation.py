"""Generating by vLLM servers over HTTP."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mmkd.teachers.vllm_client import VLLMClient

from .generator import Advance, Answer, Generator, Prompt, RowError, Sampling
from .local_generation import AnswerTokens

Asked = TypeVar("Asked")


class ServerGenerator(Generator[Asked]):
    """vLLM servers. `prompt_of` makes what is sent; of each prompt only when its turn comes, since images are large.

    Answers end as the served model's do, or as `tokens` says.
    """

    def __init__(self, client: VLLMClient, prompt_of: Callable[[Asked], Prompt], tokens: AnswerTokens | None = None):
        self.client, self.prompt_of = client, prompt_of
        self.own: dict[str, Any] = {}
        if tokens is not None:
            self.own["stop_token_ids"] = tokens.stops
            if tokens.silenced:
                self.own["logit_bias"] = {str(token): -100.0 for token in tokens.silenced}

    def generate(
        self, prompts: Sequence[Asked], sampling: Sampling, samples: int = 1, advance: Advance = lambda tokens: None
    ) -> list[list[Answer] | RowError]:
        settings = {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
        }
        answers: list[list[Answer] | RowError] = []
        for reply in self.client.generate(map(self.prompt_of, prompts), {**settings, **self.own}, samples):
            answers.append(reply)
            advance(0 if isinstance(reply, RowError) else sum(len(answer.ids) for answer in reply))
        return answers
