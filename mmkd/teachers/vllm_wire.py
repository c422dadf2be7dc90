"""What goes over the wire to a vLLM server and what comes back, as types that are checked while they are read."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from mmkd.alignment.common_runs import shared_length
from mmkd.data.images import read_image
from mmkd.errors import UserError

Kind = TypeVar("Kind")


# gc=False: a page of log-probs is tens of thousands of these, which the garbage collector would walk in vain.
class LogProb(msgspec.Struct, gc=False):
    logprob: float | None
    rank: int


Positions = list[dict[int, LogProb] | None]


class Message(msgspec.Struct):
    content: str | None = None


class SampledToken(msgspec.Struct, gc=False):
    logprob: float


class SampledLogProbs(msgspec.Struct):
    """Of a generated text; completions and chat completions write them in different ways."""

    token_logprobs: list[float] | None = None
    content: list[SampledToken] | None = None

    @property
    def values(self) -> list[float]:
        """One per token."""
        return self.token_logprobs or [token.logprob for token in self.content or []]


class Choice(msgspec.Struct):
    index: int
    text: str | None = None
    message: Message | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None
    logprobs: SampledLogProbs | None = None
    prompt_logprobs: Positions | None = None


class Answers(msgspec.Struct):
    """Of completions and chat completions, which put the prompt's log-probs at different places."""

    choices: list[Choice]
    prompt_logprobs: Positions | None = None
    prompt_token_ids: list[int] | None = None


class ServedModel(msgspec.Struct):
    id: str
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class Models(msgspec.Struct):
    data: list[ServedModel]


class Version(msgspec.Struct):
    version: str


class TokenizeReply(msgspec.Struct):
    tokens: list[int]


def decoded(body: bytes, kind: type[Kind], source: str) -> Kind:
    """A JSON answer as a value of its type; ValueError when it is something else."""
    # Typed decoding skips what is not read here (a third of the bytes are decoded tokens): with the arrays made of it,
    # 18 us per token at k=64 where the json module takes 63 and orjson 27.
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise UserError(f"{source} answered something that is not vLLM's: {error}: {body[:200]!r}") from error


def scoring(k: int) -> dict[str, Any]:
    """What makes a request a scoring one: the prompt's log-probs, and the one token that vLLM must generate."""
    return {"prompt_logprobs": k, "max_tokens": 1, "temperature": 0}


def sampled(images: bool) -> dict[str, Any]:
    """What asks for the log-prob of each token that is generated, and of no other."""
    return {"logprobs": True, "top_logprobs": 0} if images else {"logprobs": 0}


def positions(entries: Positions | None, count: int) -> list[dict[int, LogProb]]:
    """One entry per token of the prompt, the first of them empty; ValueError when there is no such entry."""
    if entries is None:
        raise UserError("The server gave no log-probs of the prompt; it must be a vLLM that takes prompt_logprobs.")
    if len(entries) != count:
        raise UserError(f"The server scored {len(entries)} tokens where {count} were sent.")
    return [entry or {} for entry in entries]


def top_k(
    entries: Sequence[Mapping[int, LogProb]], k: int
) -> tuple[Int[np.ndarray, "token k"], Float[np.ndarray, "token k"]]:
    """Ids and log-probs of the `k` most likely tokens, most likely first.

    An entry holds them and, where it is not among them, the actual token, whose rank is then above k. Raises
    ValueError when there are fewer than k, or when they are no log-probs.
    """
    candidates = [log_prob for entry in entries for log_prob in entry.values()]
    token = np.repeat(np.arange(len(entries)), [len(entry) for entry in entries])
    rank = np.array([log_prob.rank for log_prob in candidates], np.int64)
    listed = rank <= k
    token, rank = token[listed], rank[listed] - 1
    ids, log_probs = np.zeros((len(entries), k), np.int32), np.full((len(entries), k), np.inf, np.float32)
    ids[token, rank] = np.array([i for entry in entries for i in entry], np.int64)[listed]
    # None, vLLM's way to write a NaN, becomes NaN again.
    log_probs[token, rank] = np.array([log_prob.logprob for log_prob in candidates], np.float32)[listed]
    absent = np.isposinf(log_probs)
    if absent.any():
        raise UserError(
            f"The server gave {k - int(absent.sum(-1).max())} log-probs of a token where k={k} were asked for. Its "
            "vocabulary may be smaller than k, or it is no vLLM: choose a smaller k."
        )
    # A few units in the last place above 0 are rounding; logits are far above.
    if np.isnan(log_probs).any() or log_probs.max(initial=0) > 1e-3:
        raise UserError(
            "The server's log-probs are NaN or positive. NaN: the teacher's activations probably overflow, serve it "
            "with --dtype bfloat16 or float32. Positive: serve it with --logprobs-mode raw_logprobs."
        )
    return ids, log_probs


def log_probs_of(entries: Sequence[Mapping[int, LogProb]], ids: Sequence[int]) -> Float[np.ndarray, "token"]:
    """The log-prob of the prompt's own token in each entry, which vLLM lists whatever its rank."""
    values = [entry[token].logprob if token in entry else None for entry, token in zip(entries, ids, strict=True)]
    if any(value is None for value in values):
        raise UserError("The server did not list the prompt's own tokens among its log-probs; it must be a vLLM.")
    return np.array(values, np.float32)


def openai_messages(
    messages: Sequence[Mapping[str, Any]], images: Sequence[Image.Image | str]
) -> list[dict[str, Any]]:
    """Messages in OpenAI's form with the images in their places; ValueError when they do not fit, or are of no use."""
    left = iter(images)
    places = sum(part["type"] == "image" for message in messages for part in _parts(message))
    if places != len(images):
        raise UserError(f"The messages have {places} places for images, but the row has {len(images)} images.")
    return [
        {**message, "content": [_openai_part(part, left) for part in _parts(message)]}
        # A plain string stays one: a template may treat it unlike a list of one text.
        if _parts(message)
        else dict(message)
        for message in messages
    ]


def _parts(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    content = message.get("content")
    # A message that only calls tools has none.
    return [] if content is None or isinstance(content, str) else content


def _openai_part(part: Mapping[str, Any], images: Any) -> dict[str, Any]:
    if part["type"] == "image":
        return {"type": "image_url", "image_url": {"url": data_url(next(images))}}
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    raise UserError(f"A part of a message is of type {part['type']!r}; only image and text can be sent to a server.")


def data_url(image: Image.Image | str) -> str:
    """An image as it is sent, the pixels that a model in this process would be given; a data URL as it is."""
    if isinstance(image, str):
        return image
    file = io.BytesIO()
    read_image(image).save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def difference(ours: Sequence[int], theirs: Sequence[int], image_token_id: int | None = None) -> str:
    """Where two lists of ids part, in words, with what follows there and how many image tokens each side has."""
    at = shared_length(ours, theirs)
    words = (
        f"{len(theirs)} tokens instead of {len(ours)}, and from position {at} on {_excerpt(theirs, at)} instead of "
        f"{_excerpt(ours, at)}"
    )
    if image_token_id is None:
        return words
    counts = [list(ids).count(image_token_id) for ids in (theirs, ours)]
    return f"{words}; {counts[0]} image tokens instead of {counts[1]}"


def _excerpt(ids: Sequence[int], at: int) -> str:
    return f"{[int(i) for i in ids[at : at + 5]]}" if at < len(ids) else "nothing"
