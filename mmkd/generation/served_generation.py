"""Generating by vLLM servers over HTTP."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mmkd.teachers.vllm_client import VLLMClient

from .generator import Advance, Answer, Generator, Prompt, RowError, Sampling
from .local_generation import AnswerTokens

Asked = TypeVar("Asked")


class ServerGenerator(Generator[Asked]):
    """vLLM servers. `prompt_of` makes what is sent; of each prompt only when its turn comes, since images are large.

    Answers end as the served model's do, or as `tokens` says. With `log_probs` they tell those of their tokens.
    """

    def __init__(
        self,
        client: VLLMClient,
        prompt_of: Callable[[Asked], Prompt],
        tokens: AnswerTokens | None = None,
        log_probs: bool = False,
    ):
        self.client, self.prompt_of, self.log_probs = client, prompt_of, log_probs
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
        asked = map(self.prompt_of, prompts)
        for reply in self.client.generate(asked, {**settings, **self.own}, samples, self.log_probs):
            answers.append(reply)
            advance(0 if isinstance(reply, RowError) else sum(len(answer.ids) for answer in reply))
        return answers
