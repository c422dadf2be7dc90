"""Last hidden states of a model that vLLM's pooling runner serves: what is asked, and the bytes that come back."""

from typing import Any

import msgspec
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmkd.errors import UserError

from .endpoints import Endpoints, Refusal, Reply
from .image_rows import ImageRows, chat_of, unlike
from .server_checks import POOLING, WIRE_TYPES, ServerFacts, row_refusal, states_request
from .vllm_rows import RowError, ScoreRequest


class _Table(msgspec.Struct):
    """Where in the body the states of one prompt are."""

    index: int
    start: int
    end: int
    shape: list[int]
    embed_dtype: str


class _Tables(msgspec.Struct):
    data: list[_Table]


async def states_of(
    endpoints: Endpoints,
    facts: ServerFacts,
    question: ScoreRequest,
    dtype: torch.dtype,
    images: ImageRows,
    url: str | None = None,
    retry: bool = True,
) -> Float[Tensor, "token width"] | RowError:
    """The states that predict the question's supervised tokens, in the type in which they travel.

    One of the servers is asked, the one with this `url` where there is one.
    """
    places = np.flatnonzero(question.supervised) - 1
    if not len(places):
        return torch.empty(0, 0, dtype=dtype)
    # The state before the last supervised token predicts it, and nothing after that is needed.
    ids = np.asarray(question.ids)[: places[-1] + 1].tolist()
    if len(ids) > facts.max_model_len:
        return RowError(
            f"The row's {len(ids)} tokens do not fit into the server's {facts.max_model_len}; start it with a larger "
            "--max-model-len."
        )
    body: dict[str, Any] = {**states_request(facts.model, dtype), "input": ids}
    count = len(ids)
    if question.images:
        # With images the server tokenises itself, and says only how many tokens it made.
        chat = await chat_of(question)
        if isinstance(chat, RowError):
            return chat
        tokens = await images.tokens(question, chat, facts.model)
        if isinstance(tokens, RowError):
            return tokens
        if tokens.shared < len(ids):
            return unlike(tokens)
        body, count = {**states_request(facts.model, dtype), **chat}, tokens.count
    try:
        reply = await endpoints.reply(POOLING, msgspec.json.encode(body), url, retry)
    except Refusal as refusal:
        return RowError(row_refusal(refusal, body))
    (states,) = states_in(reply, [count], dtype)
    # A copy only where tokens in between are not supervised.
    whole = len(places) == places[-1] - places[0] + 1
    chosen = states[places[0] : places[-1] + 1] if whole else states[torch.from_numpy(places)]
    # The extremes, which NaN is among, take one pass and no memory.
    if not torch.stack(chosen.aminmax()).isfinite().all():
        raise UserError(
            f"{reply.url} answered with hidden states that are NaN or infinite. The teacher's activations probably "
            "overflow: serve it with --dtype bfloat16 or float32, and do not have states sent in float16 "
            "(teacher_server_dtype). Otherwise its weights are damaged."
        )
    return chosen


def states_in(reply: Reply, tokens: list[int], dtype: torch.dtype) -> list[Float[Tensor, "token width"]]:
    """The table of states of each prompt, of so many tokens. Raises UserError where the reply holds something else."""
    metadata = reply.headers.get("metadata")
    if metadata is None:
        raise UserError(
            f"{reply.url} answered without the header `metadata` that says what its bytes are. It must be a vLLM that "
            "knows encoding_format bytes, and a proxy in between must let the header pass."
        )
    try:
        tables = sorted(msgspec.json.decode(metadata, type=_Tables).data, key=lambda table: table.index)
    except msgspec.DecodeError as error:
        raise UserError(f"{reply.url} answered something that is not vLLM's: {error}: {metadata[:200]!r}") from error
    shapes = [table.shape for table in tables]
    if [shape[0] for shape in shapes if len(shape) == 2] != tokens:
        raise UserError(
            f"{reply.url} answered with states of the shapes {shapes} where one row for each of {tokens} tokens was "
            "asked for. Start it with --pooler-config.task token_embed."
        )
    size = dtype.itemsize
    for table in tables:
        rows, width = table.shape
        if table.embed_dtype != WIRE_TYPES[dtype]:
            raise UserError(f"{reply.url} answered in {table.embed_dtype} where {WIRE_TYPES[dtype]} was asked for.")
        if table.end - table.start != rows * width * size or table.end > len(reply.content):
            raise UserError(
                f"{reply.url} answered with {len(reply.content)} bytes, in which {rows} states of {width} numbers "
                f"from byte {table.start} on are not whole. The answer was cut short: see the server's log."
            )
    return [
        torch.frombuffer(reply.content, dtype=dtype, count=table.shape[0] * table.shape[1], offset=table.start).view(
            *table.shape
        )
        for table in tables
    ]
