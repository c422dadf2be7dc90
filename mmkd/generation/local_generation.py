"""Generating with a model in this process: what ends an answer, what it must not hold, and a quiet state meanwhile."""

import copy
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from mmkd.data.prompts import IllustratedText, model_inputs
from mmkd.models.backbone import base_of, full_head
from mmkd.models.load import tokenizer_of

from .generator import Advance, Answer, Generator, Prompt, RowError, Sampling

Asked = TypeVar("Asked")


@dataclass(frozen=True)
class AnswerTokens:
    """Where an answer ends and what it must not hold, as token ids."""

    stops: list[int]
    silenced: list[int]
    pad: int

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> "AnswerTokens":
        """An answer ends at the model's own tokens and at the tokenizer's, of which there may be none."""
        stops = sorted({*stops_of(model), tokenizer.eos_token_id} - {None})
        pad = tokenizer.pad_token_id
        return cls(stops, [], next(iter(stops), 0) if pad is None else pad)


class LocalGenerator(Generator[Asked]):
    """A model in this process.

    Args:
        model: it generates without settings of its own, such as a repetition penalty, unless `own_settings`.
        processing_class: the model's tokenizer or processor.
        inputs: what the model reads of the prompts of a batch, padded on the left.
        batches: which of the prompts are read together, as their places.
        tokens: where answers end; by default at the model's own tokens and the tokenizer's.
        positions: the longest context, within which prompts and answers stay.
        autocast: entered while the model generates.
        whole: entered before anything is read, once per call: there weights that ranks share are whole on each.
    """

    def __init__(
        self,
        model: Any,
        processing_class: Any,
        inputs: Callable[[list[Asked]], Mapping[str, Any]],
        batches: Callable[[Sequence[Asked]], Iterable[list[int]]],
        tokens: AnswerTokens | None = None,
        positions: int | None = None,
        own_settings: bool = False,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        whole: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        self.model, self.processing_class, self.tokenizer = model, processing_class, tokenizer_of(processing_class)
        self.inputs, self.batches = inputs, batches
        self.tokens = AnswerTokens.of(base_of(model), self.tokenizer) if tokens is None else tokens
        self.positions, self.own_settings = positions, own_settings
        self.autocast, self.whole = autocast, whole

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Asked], sampling: Sampling, samples: int = 1, advance: Advance = lambda tokens: None
    ) -> list[list[Answer] | RowError]:
        answers: dict[int, list[Answer] | RowError] = {}
        # The prompts alone would not say which random numbers they get: those are of this call and batch.
        with self.whole(), seeded(self.model, sampling.seed), speaking(self.model, self.own_settings):
            for places in self.batches(prompts):
                continuations = self.continued([prompts[place] for place in places], sampling, samples)
                answers |= zip(places, continuations, strict=True)
                advance(sum(len(answer.ids) for own in continuations for answer in own))
        return [answers[place] for place in range(len(prompts))]

    def continued(self, prompts: list[Asked], sampling: Sampling, samples: int) -> list[list[Answer]]:
        """The answers to the prompts of one batch."""
        answers = [self._answer(ids) for ids in self._continuations(prompts, sampling, samples)]
        return [answers[first : first + samples] for first in range(0, len(answers), samples)]

    def stream(self, prompt: Asked, sampling: Sampling) -> Iterator[str]:
        """The answer to one prompt in pieces, as they are generated. Closing the iterator ends the generation."""
        streamer: Any = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        closed, errors = threading.Event(), []

        def generate() -> None:
            try:
                with torch.no_grad(), seeded(self.model, sampling.seed), speaking(self.model, self.own_settings):
                    ends = StoppingCriteriaList([_StopWhen(closed.is_set)])
                    self._continuations([prompt], sampling, 1, streamer=streamer, stopping_criteria=ends)
            except Exception as error:
                # It belongs to who reads the pieces, in another thread.
                errors.append(error)
            finally:
                streamer.end()

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            closed.set()
            thread.join()
        if errors:
            raise errors[0]

    def _continuations(
        self, prompts: list[Asked], sampling: Sampling, samples: int, **options: Any
    ) -> list[list[int]]:
        """The tokens after the prompts of one batch, padded to one length."""
        base: Any = base_of(self.model)
        inputs = self.read(prompts)
        width = inputs["input_ids"].shape[1]
        config = self.configured(sampling, samples, width)
        with self.autocast():
            # Each rank has prompts of its own, and as many batches of them as it has.
            tokens = base.generate(**inputs, generation_config=config, synced_gpus=False, **options)
        return tokens[:, width:].tolist()

    def configured(self, sampling: Sampling, samples: int, width: int) -> GenerationConfig:
        """How the model goes on with prompts of so many tokens."""
        config = copy.deepcopy(base_of(self.model).generation_config)
        assert config is not None
        config.update(**self._settings(sampling, samples, width))
        return config

    def read(self, prompts: list[Asked]) -> dict[str, Any]:
        """What the model reads of the prompts of one batch, on its device."""
        device = base_of(self.model).device
        return {name: v.to(device) if isinstance(v, Tensor) else v for name, v in self.inputs(prompts).items()}

    def _settings(self, sampling: Sampling, samples: int, width: int) -> dict[str, Any]:
        sampled = sampling.temperature > 0
        room = sampling.max_new_tokens if self.positions is None else self.positions - width
        settings = {
            "max_new_tokens": max(1, min(sampling.max_new_tokens, room)),
            "num_return_sequences": samples,
            "do_sample": sampled,
            "eos_token_id": self.tokens.stops or None,
            "pad_token_id": self.tokens.pad,
            # Off in a student that trains with gradient checkpointing.
            "use_cache": True,
        }
        if sampled:
            settings |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        return settings | ({"suppress_tokens": self.tokens.silenced} if self.tokens.silenced else {})

    def _answer(self, ids: list[int]) -> Answer:
        ids, ended = up_to_stop(ids, self.tokens.stops)
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Answer(str(text), ids, "stop" if ended else "length")


class _StopWhen(StoppingCriteria):
    """Ends all answers of a batch once a function says so."""

    def __init__(self, ends: Callable[[], bool]):
        self.ends = ends

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.ends(), device=input_ids.device)


def on_device(model: Any) -> Any:
    """The model on this process's device, unless it is spread over several."""
    return model if getattr(model, "hf_device_map", None) is not None else model.to(Accelerator().device)


def up_to_stop(ids: Sequence[int], stops: Sequence[int]) -> tuple[list[int], bool]:
    """The tokens up to the first that ends an answer, that one included, and whether there is one."""
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    return (list(ids), False) if end is None else (list(ids[: end + 1]), True)


def prompt_inputs(processing_class: Any, prompts: Sequence[Prompt]) -> Mapping[str, Any]:
    """What a model reads of prompts, either all with images or all without, padded on the left."""
    if prompts[0].images:
        asked = [prompt.messages or IllustratedText(prompt.text or "", tuple(prompt.images)) for prompt in prompts]
        return model_inputs(processing_class, asked)
    longest = max(len(prompt.ids) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt.ids) :] = torch.tensor(list(prompt.ids))
        mask[row, longest - len(prompt.ids) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def together(prompts: Sequence[Any]) -> list[list[int]]:
    """All prompts in one batch."""
    return [list(range(len(prompts)))]


def by_number(order: Iterable[int], size: int) -> list[list[int]]:
    """Batches of so many places, in this order."""
    places = list(order)
    return [places[first : first + size] for first in range(0, len(places), size)]


def stops_of(model: Any) -> list[int]:
    """The tokens at which the model's own generation ends."""
    stops = None if model.generation_config is None else model.generation_config.eos_token_id
    return [stops] if isinstance(stops, int) else list(stops or [])


def silenced_tokens(model: Any, vocab_size: int) -> list[int]:
    """What an answer must not hold: tokens from `vocab_size` on, and those that stand for images."""
    rows = full_head(model).vocab_size
    tokens = [getattr(model.config, name, None) for name in ("image_token_id", "image_token_index", "video_token_id")]
    images = [token for token in tokens if isinstance(token, int)]
    return sorted({*range(vocab_size, rows), *images})


def seed_of(text: str) -> int:
    """The random seed, 32 bits, that follows from what is to be drawn, in words: the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


@contextmanager
def seeded(model: Any, seed: int) -> Iterator[None]:
    """Inside, the random numbers of this process and of the model's device follow from a seed; then they go on."""
    device = base_of(model).device
    # By default it would take hold of every GPU of the machine.
    with torch.random.fork_rng({"cuda": [device], "cpu": []}.get(device.type)):
        torch.manual_seed(seed)
        yield


@contextmanager
def speaking(model: Any, own_settings: bool = False) -> Iterator[None]:
    """The model as it generates: in evaluation, and without settings of its own that would change its distribution."""
    base: Any = base_of(model)
    training, own = model.training, base.generation_config
    model.eval()
    # generate() fills what its own settings leave open from the model's, such as a repetition penalty.
    if not own_settings:
        base.generation_config = GenerationConfig()
    try:
        with dense_last_states(model):
            yield
    finally:
        base.generation_config = own
        model.train(training)


@contextmanager
def dense_last_states(model: Any) -> Iterator[None]:
    """Inside, the head reads the last states of a prompt as one block of memory.

    generate() gives it a slice of all states. On a CPU, torch multiplies such a slice by as many copies of the head's
    weight as there are rows: a second instead of 9 ms for 8 rows of a 135M model in bfloat16.
    """
    head: Any = base_of(model).get_output_embeddings()
    # An ensemble has the heads of its members only.
    hooks = [] if head is None else [head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
