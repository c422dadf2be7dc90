"""Engines whose replies are a function of the question, and instructions of a few words."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mmkd.generation.generator import Sampling
from mmkd.methods.comd.instructions import ImageStore, Instruction
from mmkd.methods.comd.reply_record import Engine, Question, Reply


class Scripted(Engine):
    """Replies by a function, and remembers the questions."""

    def __init__(self, reply: Callable[[Question], str], name: str = "scripted", finish_reason: str = "stop"):
        self.identity = {"name": name}
        self.reply, self.finish_reason = reply, finish_reason
        self.asked: list[Question] = []

    def replies(self, questions: Sequence[Question], sampling: Sampling) -> Iterator[list[tuple[int, Reply]]]:
        for place, question in enumerate(questions):
            self.asked.append(question)
            yield [(place, Reply(self.reply(question), 3, self.finish_reason, 0.5))]


def nothing(questions: int, tokens: int) -> None:
    """Nobody looks at the progress."""


def instruction(
    text: str, reference: str | None = None, images: Sequence[str] = (), kind: str = "seed"
) -> Instruction:
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}] if images else text
    return ImageStore(Path()).instruction(
        [{"role": "user", "content": content}], images, reference=reference, kind=kind
    )
