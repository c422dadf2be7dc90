"""Who reads an exported student: one interface over llama.cpp, ONNX Runtime, vLLM and transformers."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmkd.errors import UserError
from mmkd.generation.generator import Sampling
from mmkd.teachers.batch import View

PROMPT_TOKENS, NEW_TOKENS = 128, 32
"""What speed is measured with."""


@dataclass(frozen=True)
class Scored:
    """What a runtime says of the tokens of a sequence, each after those before it.

    A runtime that lists only the likeliest tokens has their ids in `listed`; `log_probs` are those of the listed ones.
    """

    labels: Int[Tensor, "token"]
    of_labels: Float[Tensor, "token"]
    log_probs: Float[Tensor, "token outcome"]
    listed: Int[Tensor, "token outcome"] | None = None

    @classmethod
    def of(cls, log_probs: Float[Tensor, "token vocab"], labels: Int[Tensor, "token"]) -> "Scored":
        return cls(labels, log_probs.gather(-1, labels[:, None]).squeeze(-1), log_probs)

    @property
    def top(self) -> Int[Tensor, "token"]:
        """The likeliest tokens."""
        best = self.log_probs.argmax(-1)
        return best if self.listed is None else self.listed.gather(-1, best[:, None]).squeeze(-1)

    def at(self, places: Tensor) -> "Scored":
        """The same at some of the tokens."""
        listed = None if self.listed is None else self.listed[places]
        return Scored(self.labels[places], self.of_labels[places], self.log_probs[places], listed)

    def kl_from(self, student: Float[Tensor, "token vocab"]) -> Float[Tensor, "token"]:
        """KL of the student's distribution from this one, in nats per token.

        Of listed tokens it is that of the listed ones with all others as one outcome, which is not larger.
        """
        if self.listed is None:
            size = min(student.shape[-1], self.log_probs.shape[-1])
            return _kl(student[:, :size], self.log_probs[:, :size])
        ours = student.gather(-1, self.listed)
        return _kl(_with_rest(ours), _with_rest(self.log_probs))


class Runtime(ABC):
    """An exported student that is loaded."""

    name: str
    """The runtime with its version."""
    load_seconds: float = 0.0
    reads_images: bool = False

    @abstractmethod
    def scored(self, ids: Sequence[int]) -> Scored:
        """The tokens of a sequence after the first."""

    @abstractmethod
    def tokens(self, ids: Sequence[int], sampling: Sampling, stops: Sequence[int]) -> Iterator[int]:
        """Goes on with a sequence, up to a token that ends the answer, that one included."""

    def read(self, view: View) -> Scored:
        """The supervised tokens of a row. Raises UserError for images that it does not read."""
        if has_images(view):
            raise UserError(f"{self.name} is not given images here; name rows without any.", because="not built")
        ids = view.inputs["input_ids"][0]
        return self.scored(ids.tolist()).at(view.supervised[0].cpu())

    def speed(self, vocab_size: int) -> dict[str, float]:
        """Tokens per second of a prompt and of the answer after it, one sequence at a time: the best of three."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocab_size, (PROMPT_TOKENS,), generator=generator).tolist()
        # The first run warms up.
        times = [_times(self.tokens(ids, Sampling(tokens), ())) for tokens in (2, *(NEW_TOKENS,) * 3)][1:]
        first, rest = min(marks[0] for marks in times), min(marks[-1] - marks[0] for marks in times)
        return {
            "prompt_tokens_per_second": PROMPT_TOKENS / first,
            "tokens_per_second": (len(times[0]) - 1) / max(rest, 1e-9),
        }

    def close(self) -> None:
        """Frees what it holds; most hold nothing but memory."""
        return


def has_images(view: View) -> bool:
    """Whether a row has images."""
    return bool(set(view.inputs) & {"pixel_values", "image_grid_thw", "images"})


def sampled(logits: Float[Tensor, "vocab"], sampling: Sampling, generator: torch.Generator) -> int:
    """One token drawn; temperature 0 takes the likeliest."""
    if sampling.temperature <= 0:
        return int(logits.argmax())
    probs = (logits.float() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probs.sort(descending=True)
        outside = ordered.cumsum(-1) - ordered > sampling.top_p
        probs = probs.index_fill(0, order[outside], 0.0)
    return int(torch.multinomial(probs, 1, generator=generator))


def _times(tokens: Iterator[int]) -> list[float]:
    begun = time.perf_counter()
    return [time.perf_counter() - begun for _ in tokens]


def _kl(p: Tensor, q: Tensor) -> Tensor:
    # 0 * inf where a token is impossible for one of them.
    return (p.exp() * (p - q)).nan_to_num(nan=0.0, posinf=0.0).sum(-1)


def _with_rest(log_probs: Tensor) -> Tensor:
    rest = (1 - log_probs.double().exp().sum(-1, keepdim=True)).clamp(min=1e-12).log()
    return torch.cat([log_probs, rest.to(log_probs.dtype)], -1)
