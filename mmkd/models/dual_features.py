"""Features of many images and texts of a dual encoder, and what is measured with them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from mmkd.errors import UserError
from mmkd.losses.retrieval import ClassAccuracy, check_finite, retrieval_ranks

from .class_prompts import check_class_prompts, class_features
from .dual_encoder import DualEncoder
from .linear_probe import Probed, linear_probe

BATCH = 64
"""Images or texts at a time."""

RECALLS = (1, 5, 10)
"""The numbers of answers among which a right one counts."""


class Pairs(Protocol):
    """Pictures, or texts, each with its captions."""

    @property
    def captions(self) -> Sequence[Sequence[str]]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> tuple[Any, tuple[str, ...]]: ...


@contextmanager
def _asked(encoder: DualEncoder) -> Iterator[None]:
    """The encoder without dropout and gradients, and as it was afterwards."""
    training = encoder.model.training
    encoder.model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        encoder.model.train(training)


def image_features(encoder: DualEncoder, images: Iterable[Any], batch: int = BATCH) -> Float[Tensor, "image width"]:
    """Features of images (PIL), of unit length, in fp32 on the CPU. Raises UserError where they are not finite."""
    return _features(encoder, images, encoder.prepare_images, encoder.encode_images, "images", batch)


def text_features(encoder: DualEncoder, texts: Iterable[str], batch: int = BATCH) -> Float[Tensor, "text width"]:
    """Features of texts, of unit length, in fp32 on the CPU. Raises UserError where they are not finite."""
    return _features(encoder, texts, encoder.prepare_texts, encoder.encode_texts, "texts", batch)


def _features(
    encoder: DualEncoder,
    inputs: Iterable[Any],
    prepare: Callable[..., Any],
    encode: Callable[..., Tensor],
    subject: str,
    batch: int,
) -> Tensor:
    parts: list[Tensor] = []
    waiting = iter(inputs)
    with _asked(encoder):
        while chunk := list(islice(waiting, batch)):
            parts.append(encode(prepare(chunk)).float().cpu())
    features = torch.cat(parts)
    check_finite(features, subject)
    return normalize(features, dim=-1)


@dataclass(frozen=True)
class Recall:
    """Ranks of the best right answers: of the texts for each picture, and of the pictures for each different text.

    Where both sides are texts, the first ones stand in the place of pictures.
    """

    image_to_text: Int[Tensor, "image"]
    text_to_image: Int[Tensor, "text"]

    @property
    def values(self) -> dict[str, float]:
        """`image_to_text_recall@1` -> the share of pictures with a right text among the first, and so on."""
        return {name: hits.double().mean().item() for name, hits in self.hits.items()}

    @property
    def hits(self) -> dict[str, Tensor]:
        """The same of each query: whether a right answer is among the first."""
        ranks = {"image_to_text": self.image_to_text, "text_to_image": self.text_to_image}
        return {f"{name}_recall@{count}": own < count for name, own in ranks.items() for count in RECALLS}


def recall_of(encoder: DualEncoder, pairs: Pairs, batch: int = BATCH) -> Recall:
    """How well pictures and captions find each other among all of `pairs`.

    Equal captions of several pictures are one text, for which each of these pictures is right. Raises UserError for
    fewer than two pictures or texts, among which everything is found.
    """
    texts = list(dict.fromkeys(text for own in pairs.captions for text in own))
    if len(pairs) < 2 or len(texts) < 2:
        raise UserError(
            f"Recall needs several pictures and captions to choose among; there are {len(pairs):,} pictures and "
            f"{len(texts):,} different captions."
        )
    numbers = {text: number for number, text in enumerate(texts)}
    right_texts = [sorted(numbers[text] for text in own) for own in pairs.captions]
    right_pictures: list[list[int]] = [[] for _ in texts]
    for picture, own in enumerate(right_texts):
        for text in own:
            right_pictures[text].append(picture)
    of_texts = text_features(encoder, texts, batch)
    firsts = (pairs[number][0] for number in range(len(pairs)))
    of_firsts = (image_features if encoder.has_images else text_features)(encoder, firsts, batch)
    return Recall(
        retrieval_ranks(of_firsts, of_texts, right_texts), retrieval_ranks(of_texts, of_firsts, right_pictures)
    )


def zero_shot(
    encoder: DualEncoder,
    features: Float[Tensor, "image width"],
    labels: Sequence[int],
    class_names: Sequence[str],
    templates: Sequence[str],
) -> tuple[ClassAccuracy, Int[Tensor, "image"]]:
    """How many images are nearest to the text of their class, and the nearest class of each.

    `features` are `image_features`. Raises UserError for classes that are the same tokens for the model.
    """
    check_class_prompts(encoder.prepare_texts, class_names, templates)
    classes = class_features(lambda texts: text_features(encoder, texts), class_names, templates)
    predictions = (features @ classes.T).argmax(-1)
    truth = torch.as_tensor(np.asarray(labels))
    return ClassAccuracy(predictions == truth, truth), predictions


def probed(train: tuple[Tensor, Sequence[int]], validation: tuple[Tensor, Sequence[int]], test: Tensor) -> Probed:
    """A linear probe on `image_features` of labelled images."""
    learnt, held = ((features.numpy(), np.asarray(labels)) for features, labels in (train, validation))
    return linear_probe(learnt, held, test.numpy())
