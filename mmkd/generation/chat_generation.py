"""Generating by any server of OpenAI's chat protocol, of whose model nothing is known here but its name."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mmkd.teachers.chat_api import Chat, ChatClient, ChatReply

from .generator import Advance, Answer, Generator, Prompt, RowError, Sampling
from .local_generation import seed_of
from .thoughts import with_thoughts

Asked = TypeVar("Asked")


@dataclass(frozen=True)
class CountedAnswer(Answer):
    """An answer whose tokens nobody here knows, with their number."""

    count: int = 0

    @property
    def tokens(self) -> int:
        return self.count


class ChatGenerator(Generator[Asked]):
    """Chat servers. `prompt_of` makes the messages that are sent, of each prompt only when its turn comes.

    Thoughts that a server tells apart from its answer stand before it, between <think> and </think>. Whether the same
    question gets the same answer again is up to the server.
    """

    def __init__(self, client: ChatClient, prompt_of: Callable[[Asked], Prompt]):
        self.client, self.prompt_of = client, prompt_of

    def generate(
        self, prompts: Sequence[Asked], sampling: Sampling, samples: int = 1, advance: Advance = lambda tokens: None
    ) -> list[list[Answer] | RowError]:
        settings: dict[str, Any] = {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        answers: list[list[Answer] | RowError] = [[] for _ in prompts]
        # One by one: not every server takes the protocol's `n`.
        replies = self.client.replies(self._chats(prompts, sampling.seed, samples), settings)
        for place, reply in enumerate(replies):
            own = answers[place // samples]
            if isinstance(own, RowError):
                continue
            if isinstance(reply, RowError):
                answers[place // samples] = reply
                continue
            own.append(_answer(reply))
            advance(reply.completion_tokens)
        return answers

    def _chats(self, prompts: Sequence[Asked], seed: int, samples: int) -> Iterator[Chat]:
        for number, asked in enumerate(prompts):
            prompt = self.prompt_of(asked)
            assert prompt.messages is not None
            for sample in range(samples):
                yield Chat(prompt.messages, prompt.images, seed_of(f"{seed} {number} {sample}") >> 1)


def _answer(reply: ChatReply) -> CountedAnswer:
    text = with_thoughts(reply.thoughts, reply.text)
    return CountedAnswer(text, [], reply.finish_reason, count=reply.completion_tokens)
