"""What is asked of a served model about one row, and what it answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

Ids = Sequence[int] | Int[np.ndarray, "token"]

# Sampling parameters that a request always states: the server would otherwise take its model's generation_config.json.
NEUTRAL_SAMPLING = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
SAMPLING = {*NEUTRAL_SAMPLING, "max_tokens", "min_tokens", "seed", "stop", "stop_token_ids", "ignore_eos"}
SAMPLING |= {"allowed_token_ids", "bad_words", "include_stop_str_in_output", "logit_bias", "skip_special_tokens"}


@dataclass(frozen=True)
class Prompt:
    """Tokens to continue. With images also the messages they stand in, whose rendering must give these ids.

    `messages` are in the form of transformers and TRL: a content is a string, or a list of `{"type": "image"}` and
    `{"type": "text", "text": ...}`, and the images fill their places in order. `text` has their places where there are
    no messages; no server can be asked so.
    """

    ids: Ids
    messages: list[dict[str, Any]] | None = None
    images: Sequence[Image.Image] = ()
    text: str | None = None


@dataclass(frozen=True)
class ServedRow:
    """A row with images as a server is asked about it: with pictures, which the server makes tokens itself."""

    images: tuple[str, ...]
    """Data URLs, of the pixels that a model in this process is given."""
    messages: list[dict[str, Any]] | None
    """In transformers' form, with places for the images; None for plain text."""
    template: Mapping[str, Any]
    """What the chat template takes besides messages, such as tools."""
    head: list[int]
    """The row's first tokens with a placeholder in the place of each image's, up to the last image or a bit further.

    Empty where the row's own tokens do not follow from such."""
    head_length: int
    """How many of the row's tokens `head` stands for."""
    image_token_id: int | None
    """What stands for a piece of an image."""
    key: int
    """By which the row's number is found when something is wrong with it (`RowNames.of_key`)."""


@dataclass(frozen=True)
class ScoreRequest:
    """Tokens to score: wanted are the teacher's log-probs of token t given the tokens before it, where supervised[t].

    Token 0 is never supervised. `messages` and `images` as in `Prompt`; what else there is to say about a row with
    images as in `ServedRow`.
    """

    ids: Ids
    supervised: Bool[np.ndarray, "token"]
    messages: list[dict[str, Any]] | None = None
    images: Sequence[Image.Image | str] = ()
    """Images, or their data URLs."""
    template: Mapping[str, Any] = field(default_factory=dict[str, Any])
    head: Sequence[int] = ()
    head_length: int = 0
    image_token_id: int | None = None
    key: int | None = None

    @classmethod
    def of(cls, ids: Ids, supervised: Bool[np.ndarray, "token"], row: ServedRow | None) -> Self:
        """The question about a row's tokens; `row` where it has images."""
        return cls(ids, supervised) if row is None else cls(ids, supervised, **vars(row))

    @property
    def needed(self) -> int:
        """How many tokens the server must read: nothing after the last supervised token changes what it says."""
        return int(np.flatnonzero(self.supervised)[-1]) + 1

    def __post_init__(self):
        assert len(self.supervised) == len(self.ids), "one flag per token"
        assert not self.supervised[:1].any(), "nothing comes before token 0"


@dataclass(frozen=True)
class TopK:
    """The k most likely tokens at each supervised token of a row, most likely first, their log-probs, and its own."""

    ids: Int[np.ndarray, "token k"]
    log_probs: Float[np.ndarray, "token k"]
    label_log_probs: Float[np.ndarray, "token"]


@dataclass(frozen=True)
class Answer:
    """One continuation of a prompt; `finish_reason` is "stop" at the end of sequence and "length" at max_tokens."""

    text: str
    ids: list[int]
    finish_reason: str
    log_probs: list[float] | None = None
    """Of its tokens, at temperature 1 over the whole vocabulary, where they were asked for."""
    replaced: list[bool] | None = None
    """Which of its tokens a teacher has put in the place of another one, where one could."""

    @property
    def tokens(self) -> int:
        """How many it has, the end of sequence included."""
        return len(self.ids)


@dataclass(frozen=True)
class RowError:
    """Stands in the place of a row's answer when the server refuses this row, and says why; other rows go on."""

    reason: str
