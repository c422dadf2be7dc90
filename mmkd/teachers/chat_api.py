"""A client of any server of OpenAI's chat protocol: messages and pictures go there, text comes back.

It needs neither tokenizer nor log-probs, so that hosted models can be asked as well as vLLM, SGLang or llama.cpp.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec
from PIL import Image

from mmkd.data.credentials import refuse_user_info
from mmkd.errors import UserError

from . import vllm_wire as wire
from .endpoints import Endpoints, Refusal
from .vllm_rows import RowError

logger = logging.getLogger(__name__)

_HERE = ("localhost", "127.0.0.1", "::1")
# What every server of the protocol takes as said where it is not said.
_DEFAULTS = {"temperature": 1.0, "top_p": 1.0}
# Statuses that concern the conversation that was sent, and no other.
_ROW_STATUSES = (400, 413, 422)


@dataclass(frozen=True)
class Chat:
    """A conversation to go on with: messages in the form of transformers, and the images that fill their places."""

    messages: Sequence[Mapping[str, Any]]
    images: Sequence[Image.Image | str] = ()
    seed: int | None = None


@dataclass(frozen=True)
class ChatReply:
    """What a server said: the answer, the thoughts where it tells them apart, and what it counted."""

    text: str
    thoughts: str | None
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    first_tokens: tuple[tuple[str, float], ...] = ()
    """What the answer might have begun with, and the log-probs; empty where that was not asked for."""


class _Said(msgspec.Struct):
    content: str | None = None
    # The first is the name of DeepSeek and older vLLM, the second of OpenRouter and newer vLLM.
    reasoning_content: str | None = None
    reasoning: Any = None


class _Token(msgspec.Struct):
    token: str
    logprob: float


class _Place(msgspec.Struct):
    top_logprobs: list[_Token] = []


class _LogProbs(msgspec.Struct):
    content: list[_Place] | None = None


class _Choice(msgspec.Struct):
    message: _Said
    finish_reason: str | None = None
    logprobs: _LogProbs | None = None

    @property
    def first_tokens(self) -> tuple[tuple[str, float], ...]:
        """The listed tokens of the first place."""
        places = (self.logprobs and self.logprobs.content) or []
        return tuple((token.token, token.logprob) for token in places[0].top_logprobs) if places else ()


class _Counts(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice]
    usage: _Counts | None = None


class _Name(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Name]


class ChatClient:
    """Asks one or several URLs of one chat model; a context manager that closes its connections.

    The key is that of the first of the environment's variables `key_names` that is set, and is never written down.
    Raises UserError when nobody answers, when permission is refused, and when several models are offered and `model`
    names none of them; `model_key` is the name of the setting that would. What concerns one conversation only is
    handed out as a `RowError` in its place.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str | None,
        *,
        key_names: Sequence[str] = ("OPENAI_API_KEY",),
        model_key: str = "teacher_api_model",
        concurrency: int = 16,
        timeout: float = 600,
        retries: int = 10,
    ):
        self._key_names, self._model_key, self._model = tuple(key_names), model_key, model
        for url in urls:
            refuse_user_info(url, "A server")
        bases = [_base(url) for url in urls]
        self._path = "/v1" if all(versioned for _, versioned in bases) else ""
        if any(versioned for _, versioned in bases) and not self._path:
            raise UserError(
                f"The URLs {', '.join(urls)} are of different forms. End all of them with /v1, or none of them."
            )
        key = next((os.environ[name] for name in key_names if os.environ.get(name)), None)
        if key is None and not all(urlsplit(url).hostname in _HERE for url, _ in bases):
            raise UserError(
                f"There is no key for {bases[0][0]}: set {' or '.join(key_names)} in the environment, to any text for "
                "a server that asks for no key. Keys are read from there only, never from a recipe."
            )
        self._endpoints = Endpoints(
            [url for url, _ in bases],
            key,
            concurrency,
            timeout,
            retries,
            server="The chat server",
            advice="See that it runs, and that its URL is right.",
        )
        self._limit, self._left_out = "max_tokens", set[str]()
        self.prompt_tokens = self.completion_tokens = 0
        """What the servers have counted so far."""

    def __enter__(self) -> "ChatClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections; a second call does nothing."""
        self._endpoints.close()

    def offered(self) -> list[str] | None:
        """The models that the first URL offers; None where it does not list them."""
        try:
            body = self._endpoints.run(self._endpoints.request(f"{self._path}/models"))
        except Refusal as refusal:
            if refusal.status in (404, 405) and self._model is not None:
                return None
            keys = " or ".join(self._key_names)
            raise UserError(
                f"{refusal}. See that the URL is a chat server's and the key ({keys}) is right, and name the model "
                f"({self._model_key})."
            ) from refusal
        return [model.id for model in wire.decoded(body, _Models, self._endpoints.urls[0]).data]

    @property
    def model(self) -> str:
        """The model that is asked: the named one, or the only one that is offered."""
        if self._model is None:
            models = self.offered() or []
            if len(models) != 1:
                names = ", ".join(map(repr, models[:10])) or "nothing"
                raise UserError(
                    f"{self._endpoints.urls[0]} serves {names}: name the model of the role ({self._model_key})."
                )
            self._model = models[0]
        return self._model

    def replies(self, chats: Iterable[Chat], sampling: Mapping[str, Any]) -> Iterator[ChatReply | RowError]:
        """A reply to each conversation, in their order. `sampling` is max_tokens, temperature and top_p."""
        model = self.model
        return self._endpoints.map(lambda chat: self._ask(chat, sampling, model), chats)

    def each(self, chats: Iterable[Chat], sampling: Mapping[str, Any]) -> Iterator[tuple[int, ChatReply | RowError]]:
        """As `replies`, each with its place; those under way are handed out before an error is raised."""
        model = self.model
        return self._endpoints.each(lambda chat: self._ask(chat, sampling, model), chats)

    async def _ask(self, chat: Chat, sampling: Mapping[str, Any], model: str) -> ChatReply | RowError:
        messages = wire.openai_messages(chat.messages, chat.images)
        wanted = {**sampling, **({} if chat.seed is None else {"seed": chat.seed})}
        while True:
            body = {"model": model, "messages": messages, **self._accepted(wanted)}
            try:
                answer = await self._endpoints.request(f"{self._path}/chat/completions", msgspec.json.encode(body))
            except Refusal as refusal:
                if not self._can_ask_otherwise(refusal, body):
                    return self._refused(refusal)
                continue
            return self._read(answer)

    def _accepted(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """The settings under the names that the servers take, without those that go without saying."""
        named = {self._limit if key == "max_tokens" else key: value for key, value in wanted.items()}
        return {
            key: value
            for key, value in named.items()
            if key not in self._left_out and not (key in _DEFAULTS and value == _DEFAULTS[key])
        }

    def _can_ask_otherwise(self, refusal: Refusal, body: Mapping[str, Any]) -> bool:
        """Whether the servers refused a name or a seed that can be changed, which is then done from now on."""
        about = f"{refusal.parameter} {refusal.message}"
        if refusal.status not in _ROW_STATUSES:
            return False
        if "max_tokens" in body and "max_completion_tokens" in about:
            self._limit = "max_completion_tokens"
            return True
        if "seed" in body and (refusal.parameter == "seed" or "seed" in refusal.message.lower().split()):
            if "seed" not in self._left_out:
                logger.warning("%s takes no seed: it answers otherwise each time.", refusal.url)
            self._left_out.add("seed")
            return True
        # Other requests that were under way have changed it meanwhile.
        return self._limit not in body and "max_tokens" in body

    def _refused(self, refusal: Refusal) -> RowError:
        if refusal.parameter in _DEFAULTS:
            raise UserError(
                f"{refusal}. Leave {refusal.parameter} at its default of 1, which is not sent."
            ) from refusal
        if refusal.status in _ROW_STATUSES:
            return RowError(refusal.message)
        keys = " or ".join(self._key_names)
        raise UserError(f"{refusal}. See that the URL, the model's name and the key ({keys}) are right.") from refusal

    def _read(self, answer: bytes) -> ChatReply:
        url = self._endpoints.urls[0]
        completion = wire.decoded(answer, _Completion, url)
        if not completion.choices:
            raise UserError(f"{url} answered without choices: it is no chat server.")
        choice, counts = completion.choices[0], completion.usage or _Counts()
        said = choice.message
        thoughts = said.reasoning_content or (said.reasoning if isinstance(said.reasoning, str) else None)
        text = said.content or ""
        # Servers that do not count leave words to count by.
        words = len(f"{thoughts or ''} {text}".split())
        tokens = words if counts.completion_tokens is None else counts.completion_tokens
        self.prompt_tokens += counts.prompt_tokens or 0
        self.completion_tokens += tokens
        return ChatReply(
            text,
            thoughts or None,
            choice.finish_reason or "stop",
            counts.prompt_tokens or 0,
            tokens,
            choice.first_tokens,
        )


def _base(url: str) -> tuple[str, bool]:
    """A URL as `Endpoints` takes it, and whether the protocol's paths begin with /v1 there."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{url!r} is no URL of a chat server. Write it as https://HOST/v1 or http://HOST:PORT.")
    if parts.username or parts.password or parts.query:
        host = parts.hostname or "the host"
        raise UserError(
            f"The URL of {host} holds a name, a password or a key. Write the address only; keys are read from the "
            "environment."
        )
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    root = f"{parts.scheme}://{parts.netloc}"
    return f"{root}{path.removesuffix('/v1')}", path in ("", "/v1") or path.endswith("/v1")
