"""One way to generate text: prompts go on as answers, by a model in this process or by servers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from mmkd.errors import UserError
from mmkd.teachers.vllm_client import Answer as Answer
from mmkd.teachers.vllm_client import Prompt as Prompt
from mmkd.teachers.vllm_client import RowError as RowError

Asked = TypeVar("Asked")

Advance = Callable[[int], None]
"""Told of so many tokens more."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; temperature 0 is greedy decoding."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Generator(ABC, Generic[Asked]):
    """Continues prompts, of whatever type those who ask have."""

    @abstractmethod
    def generate(
        self, prompts: Sequence[Asked], sampling: Sampling, samples: int = 1, advance: Advance = lambda tokens: None
    ) -> list[list[Answer] | RowError]:
        """So many answers to every prompt, in their order, or why a prompt was refused.

        The same prompts and sampling give the same answers. `advance` is told of the tokens of each.
        """

    def stream(self, prompt: Asked, sampling: Sampling) -> Iterator[str]:
        """The answer to one prompt, as it comes; here in one piece. Raises UserError where the prompt is refused."""
        (answers,) = self.generate([prompt], sampling)
        if isinstance(answers, RowError):
            raise UserError(answers.reason)
        yield answers[0].text
