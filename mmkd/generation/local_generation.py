"""What generating with a model takes: the tokens that end an answer, those it must not hold, and a quiet state."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from mmkd.errors import UserError
from mmkd.models.backbone import base_of, full_head


def stop_tokens(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the model's own and the tokenizer's. Raises UserError where there is none."""
    config: Any = model.generation_config
    told = None if config is None else config.eos_token_id
    ends = [told] if isinstance(told, int) else list(told or [])
    stops = sorted({*ends, tokenizer.eos_token_id} - {None})
    if not stops:
        raise UserError("The student has no token that ends an answer. Set eos_token, or on_policy_fraction: 0.")
    return stops


def silenced_tokens(model: PreTrainedModel, vocab_size: int) -> list[int]:
    """What an answer must not hold: tokens from `vocab_size` on, and those that stand for images."""
    rows = full_head(model).vocab_size
    told = [getattr(model.config, name, None) for name in ("image_token_id", "image_token_index", "video_token_id")]
    images = [token for token in told if isinstance(token, int)]
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
def speaking(model: Any) -> Iterator[None]:
    """The model as it generates: in evaluation, and without settings of its own that would change its distribution."""
    base: Any = base_of(model)
    training, own = model.training, base.generation_config
    model.eval()
    # generate() fills what its own settings leave open from the model's, such as a repetition penalty.
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own
        model.train(training)
