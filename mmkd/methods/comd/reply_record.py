"""The record of a run: every question that a model was asked, and its reply, under a name made of the question."""

import hashlib
import json
import os
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmkd.errors import UserError
from mmkd.generation.generator import Sampling

from .instructions import Message

Advance = Callable[[int, int], None]
"""Told how many questions were answered, and in how many tokens."""


_SYNC = 1.0
"""Seconds after which what was written is forced to the disk."""


@dataclass(frozen=True)
class Question:
    """What a model is asked: to go on with messages, or with `answer` how likely that answer is."""

    messages: tuple[Message, ...]
    images: tuple[str, ...] = ()
    digests: tuple[str, ...] = ()
    """Hashes of the images' pixels."""
    answer: str | None = None
    sample: int = 0
    """Asked again, a question is another one."""


@dataclass(frozen=True)
class Reply:
    """What a model said in so many tokens and seconds of its own; `log_prob` (nats) where it was asked for that.

    `finish_reason` is stop, length, or why the question was refused.
    """

    text: str
    tokens: int
    finish_reason: str
    seconds: float
    log_prob: float | None = None


class Engine(ABC):
    """A model that replies."""

    identity: Mapping[str, Any]
    """What decides its replies."""

    @abstractmethod
    def replies(self, questions: Sequence[Question], sampling: Sampling) -> Iterator[list[tuple[int, Reply]]]:
        """Replies with the places of their questions, a batch at a time. Nothing is loaded before it is asked for."""

    def close(self) -> None:  # noqa: B027
        """Gives back memory and connections; it may be asked again."""


@dataclass
class Usage:
    """What a phase asked for: replies, of which so many were asked now and not read from the record."""

    replies: int = 0
    asked: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class Record:
    """A file of replies, one JSON object a line, written as they come: what was answered once is never asked again.

    A line that a killed process left unfinished is cut off.
    """

    path: Path
    known: dict[str, Reply] = field(default_factory=dict)
    usage: dict[str, Usage] = field(default_factory=lambda: defaultdict(Usage))
    """By phase, each question counted in the first phase that asks it."""
    spent: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Tokens by the engine that generated them."""
    _counted: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if not self.path.is_file():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return
        content = self.path.read_bytes()
        whole = content.rpartition(b"\n")[0]
        for number, line in enumerate(whole.splitlines(), start=1):
            entry = _read(self.path, number, line)
            self.known[entry.pop("key")] = Reply(**{name: entry[name] for name in Reply.__dataclass_fields__})
        if len(whole) + bool(whole) < len(content):
            with open(self.path, "r+b") as file:
                file.truncate(len(whole) + bool(whole))

    def ask(
        self,
        engine: Engine,
        questions: Sequence[Question],
        sampling: Sampling,
        phase: str,
        advance: Advance = lambda questions, tokens: None,
        spends: bool = True,
    ) -> list[Reply]:
        """The replies of an engine, in the order of the questions; equal questions have one reply.

        `spends`: whether the tokens count as spent by the engine.
        """
        keys = [question_key(engine.identity, question, sampling) for question in questions]
        first = {key: place for place, key in reversed(list(enumerate(keys)))}
        missing = sorted(place for key, place in first.items() if key not in self.known)
        advance(len(keys) - len(missing), 0)
        if missing:
            synced = time.monotonic()
            with open(self.path, "ab") as file:
                for batch in engine.replies([questions[place] for place in missing], sampling):
                    replies = [(keys[missing[place]], reply) for place, reply in batch]
                    file.write(b"".join(_line(key, phase, reply) for key, reply in replies))
                    # What is flushed outlives this process; a machine that loses power may cost a second of replies.
                    file.flush()
                    if time.monotonic() - synced > _SYNC:
                        os.fsync(file.fileno())
                        synced = time.monotonic()
                    self.known.update(replies)
                    advance(len(replies), sum(reply.tokens for _, reply in replies))
        usage = self.usage[phase]
        usage.asked += len(missing)
        for key in first:
            if key not in self._counted:
                self._counted.add(key)
                reply = self.known[key]
                usage.replies, usage.tokens = usage.replies + 1, usage.tokens + reply.tokens
                usage.seconds += reply.seconds
                if spends and reply.log_prob is None:
                    self.spent[engine_key(engine)] += reply.tokens
        return [self.known[key] for key in keys]


def engine_key(engine: Engine) -> str:
    """The name under which an engine's tokens are counted."""
    return json.dumps(engine.identity, sort_keys=True)


def question_key(identity: Mapping[str, Any], question: Question, sampling: Sampling) -> str:
    """Hex digest of who is asked what and how."""
    parts = [list(map(dict, question.messages)), question.digests, question.answer, question.sample]
    how = None if question.answer is not None else asdict(sampling)
    content = json.dumps([identity, parts, how], sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _line(key: str, phase: str, reply: Reply) -> bytes:
    entry = {"key": key, "phase": phase, **asdict(reply), "seconds": round(reply.seconds, 6)}
    return json.dumps(entry, ensure_ascii=False).encode() + b"\n"


def _read(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"Line {number} of {path} is damaged ({error}). Delete that line: its question is then asked again."
        ) from error
