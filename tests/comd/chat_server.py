"""A loopback server of OpenAI's chat protocol whose replies are a function of what is asked."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from typing import Any

from scripts.make_tiny_models import WORDS as TINY_WORDS
from tests.loopback import answering

WORDS = TINY_WORDS.split()


def said(body: dict[str, Any]) -> str:
    """The text of the last message that a request holds."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "\n".join(part.get("text", "") for part in content)


def kind_of(body: dict[str, Any]) -> str:
    """Whether a request is a judge's, an augmentor's or an instruction to be answered."""
    text = said(body)
    if text.startswith(("Two assistants", "Your reply did not")):
        return "judge"
    return "augment" if text.startswith("Here is an instruction") else "answer"


def scripted(body: dict[str, Any]) -> str:
    """An answer that depends on the instruction, a judge who likes few letters, an augmentor who writes new words."""
    text, seed = said(body), body["seed"]
    if kind_of(body) == "judge":
        answers = [part.partition("\n\n")[0].strip() for part in text.split("Answer of assistant")[1:]]
        scores = [max(1, 10 - len(answer) // 8) for answer in answers]
        return " ".join(map(str, scores)) + "\nShorter is better."
    number = sum(map(ord, text)) + seed
    if kind_of(body) == "augment":
        return "New instruction: " + " ".join(WORDS[(number // 13**k) % len(WORDS)] for k in range(8))
    return WORDS[number % len(WORDS)]


@dataclass
class ChatServer:
    """In `requests` the bodies of what was asked; `fail_after` so many answers it is gone for good."""

    reply: Callable[[dict[str, Any]], str] = scripted
    models: tuple[str, ...] = ("teacher",)
    finish_reason: str = "stop"
    fail_after: int | None = None
    status: int = 500
    requests: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""
    lock: Any = field(default_factory=threading.Lock)

    def count(self, kind: str) -> int:
        return sum(kind_of(body) == kind for body in self.requests)

    def respond(self, path: str, headers: Message, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path == "/v1/models":
            return 200, {"data": [{"id": model} for model in self.models]}
        with self.lock:
            if self.fail_after is not None and len(self.requests) >= self.fail_after:
                return self.status, {"error": {"message": "told to fail"}}
            self.requests.append(body)
        text = self.reply(body)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": self.finish_reason}
        return 200, {"choices": [choice], "usage": {"completion_tokens": len(text.split()) + 1}}


@contextmanager
def chat_server(**settings: Any) -> Iterator[ChatServer]:
    """A server on a free port of the loopback interface."""
    fake = ChatServer(**settings)
    with answering(fake.respond) as fake.url:
        yield fake
