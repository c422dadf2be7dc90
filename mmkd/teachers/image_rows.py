"""Rows with images at vLLM servers, which make tokens of images themselves: those are compared with the row's own."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import msgspec
import numpy as np

from mmkd.alignment.common_runs import shared_length

from . import vllm_wire as wire
from .endpoints import Endpoints, Refusal
from .server_checks import row_refusal
from .vllm_rows import Prompt, RowError, ScoreRequest

TOKENS_IN = "/inference/v1/generate"
_REMEMBERED = 100_000


@dataclass(frozen=True)
class ServerTokens:
    """What a server makes of a row: its number of tokens, how many of the first are the row's, and what differs."""

    count: int
    shared: int
    difference: str


class ImageRows:
    """How the servers are asked about rows with images."""

    def __init__(self, endpoints: Endpoints):
        self._endpoints = endpoints
        self._known: dict[bytes, ServerTokens] = {}
        self._tokens_in: asyncio.Task[bool] | None = None

    async def takes_tokens(self) -> bool:
        """Whether all servers take the row's own tokens beside its images, as vLLM does with --enable-scale-out."""
        if self._tokens_in is None:
            self._tokens_in = asyncio.ensure_future(self._describe_tokens_in())
        # A row that is given up on takes the answer from no other row.
        return await asyncio.shield(self._tokens_in)

    async def _describe_tokens_in(self) -> bool:
        for url in self._endpoints.urls:
            try:
                description = await self._endpoints.request("/openapi.json", None, url)
            except Refusal:
                # Served without a description of itself.
                return False
            if TOKENS_IN.encode() not in description or b"content_parts" not in description:
                return False
        return True

    async def tokens_read(self, row: ScoreRequest, model: str) -> int | RowError:
        """How many of a row's first tokens the servers read as they are."""
        if not row.images or (row.head and await self.takes_tokens()):
            return len(row.ids)
        chat = await chat_of(row)
        if isinstance(chat, RowError):
            return chat
        tokens = await self.tokens(row, chat, model)
        return tokens if isinstance(tokens, RowError) else tokens.shared

    async def tokens(self, row: ScoreRequest, chat: Mapping[str, Any], model: str) -> ServerTokens | RowError:
        """What the servers make of a row's messages and images (`chat_of`); a row is asked about once."""
        body = msgspec.json.encode({"model": model, **chat})
        key = blake2b(body + np.asarray(row.ids, np.int64).tobytes(), digest_size=16).digest()
        if key not in self._known:
            try:
                reply = await self._endpoints.request("/tokenize", body)
            except Refusal as refusal:
                return RowError(row_refusal(refusal, {}))
            # Answers of a student are never the same again, and would pile up.
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[key] = compared(row, wire.decoded(reply, wire.TokenizeReply, "/tokenize").tokens)
        return self._known[key]


def compared(row: ScoreRequest | Prompt, theirs: Sequence[int], image_token_id: int | None = None) -> ServerTokens:
    """The server's tokens for a row beside the row's own."""
    ours = np.asarray(row.ids).tolist()
    image_token_id = row.image_token_id if isinstance(row, ScoreRequest) and row.image_token_id else image_token_id
    shared = shared_length(ours, theirs)
    difference = "" if shared == len(ours) == len(theirs) else wire.difference(ours, theirs, image_token_id)
    return ServerTokens(len(theirs), shared, difference)


def unlike(tokens: ServerTokens) -> RowError:
    """Why a row cannot be asked about where the server makes other tokens of it."""
    return RowError(
        f"The server's tokens for these messages and images are not the row's: {tokens.difference}. Serve the teacher "
        "with the chat template and the processor settings of the training data."
    )


async def chat_of(row: ScoreRequest | Prompt) -> dict[str, Any] | RowError:
    """The part of a request that holds a row's messages and images."""
    if row.messages is None:
        return RowError(
            "It is plain text with images, which this server takes as messages only. Map the data's columns to "
            "messages; a server of log-probs (teacher_server_signal: top_k) takes it with --enable-scale-out."
        )
    # Encoding a large image takes as long as many small requests, which must not wait for it.
    try:
        messages = await asyncio.to_thread(wire.openai_messages, row.messages, row.images)
    except (OSError, ValueError) as error:
        return RowError(f"The row's images cannot be sent: {error}")
    template = row.template if isinstance(row, ScoreRequest) else {}
    given = {name: value for name, value in template.items() if value is not None}
    chat: dict[str, Any] = {"messages": messages, "add_generation_prompt": isinstance(row, Prompt)}
    return chat | ({"chat_template_kwargs": given} if given else {})


def request_by_tokens(row: ScoreRequest, body: Mapping[str, Any]) -> dict[str, Any]:
    """A request with the row's own tokens, a placeholder in the place of each image's, and the images."""
    rest = np.asarray(row.ids)[row.head_length : row.needed].tolist()
    return {
        "model": body["model"],
        "token_ids": [*row.head, *rest],
        "content_parts": [{"type": "image_url", "url": wire.data_url(image)} for image in row.images],
        "sampling_params": {name: value for name, value in body.items() if name != "model"},
        "return_token_ids": True,
    }
