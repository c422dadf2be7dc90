"""A teacher of pairs whose embeddings are read from a cache: no model is loaded, and students see the same views."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from mmkd.cache.embedding_codec import EmbeddingCodec, PairEmbeddings, pair_key
from mmkd.cache.store import Cache
from mmkd.data.picture_views import PictureView
from mmkd.errors import UserError
from mmkd.models.dual_encoder import DualEncoder, Inputs

_EMBEDDING = "embedding"


class ShownPair(Protocol):
    """A pair as a batch is made of it."""

    @property
    def row(self) -> int:
        """Its place in the data."""
        ...

    @property
    def caption(self) -> str:
        """The caption that was drawn."""
        ...

    @property
    def key(self) -> bytes | None:
        """What it is found by in a cache."""
        ...

    @property
    def view(self) -> tuple[int, PictureView] | None:
        """Which of the cached views is shown, and how it is made."""
        ...


class CachedPairs:
    """The embeddings of pairs in a finished cache. Raises UserError for a cache of something else."""

    def __init__(self, cache: str | Path | Cache):
        self.cache = cache if isinstance(cache, Cache) else Cache(cache)
        if not isinstance(self.cache.codec, EmbeddingCodec):
            raise UserError(
                f"{self.cache.folder} holds what a teacher says of tokens, and no embeddings of pairs. Build a cache "
                "with `mmkd cache build` and a recipe of method clip_kd.",
                because="meaning",
            )
        self.signal: Mapping[str, Any] = self.cache.manifest.identity["signal"]

    def at(self, key: bytes, row: int) -> PairEmbeddings:
        """The embeddings of a pair. Raises UserError where the cache has none, naming the row of the data."""
        place = self.cache.find(key)
        if place is None:
            why = "was left out when it was built" if key in self.cache.skipped_keys else "does not know this pair"
            raise UserError(
                f"The cache {self.cache.folder} has no embeddings of row {row} of the data: it {why}. The picture and "
                "all captions must be as they were then. Build the cache of these data, in another folder."
            )
        return self.cache.embeddings(place)

    def shown(self, first: Any, captions: Sequence[str], row: int) -> tuple[bytes, tuple[PictureView, ...]]:
        """What finds a pair, and its views."""
        key = pair_key(first, captions)
        return key, self.at(key, row).views


class CachedEncoder(DualEncoder):
    """A teacher that is read from a cache."""

    def __init__(self, cache: str | Path | Cache):
        self.pairs = CachedPairs(cache)
        self.model = nn.Identity()
        self.name = str(self.pairs.cache.folder)
        self.has_images = bool(self.pairs.cache.manifest.identity["preparation"]["image_processor"])

    def prepare_pairs(self, pairs: Sequence[ShownPair]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The embeddings of both sides. Raises UserError where the cache lacks a pair, or shows another view of it."""
        firsts, captions = [], []
        for pair in pairs:
            assert pair.key is not None, "rows are made with the cache"
            assert pair.view is not None
            own, (number, view) = self.pairs.at(pair.key, pair.row), pair.view
            if number >= len(own.views) or own.views[number] != view:
                raise UserError(
                    f"The cache {self.name} shows another view of row {pair.row} than the cache of another teacher. "
                    "Build the caches of all teachers with the same augmentation, cache_views and seed.",
                    because="meaning",
                )
            firsts.append(own.firsts[number])
            captions.append(own.caption(pair.caption))
        return _inputs(firsts), _inputs(captions)

    def prepare_images(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """There is no model to read other pictures."""
        self._no_model()

    def prepare_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """There is no model to read other texts."""
        self._no_model()

    def encode_images(self, inputs: Inputs) -> Float[Tensor, "image width"]:
        """The cached embeddings."""
        return inputs[_EMBEDDING]

    def encode_texts(self, inputs: Inputs) -> Float[Tensor, "text width"]:
        """The cached embeddings."""
        return inputs[_EMBEDDING]

    @property
    def width(self) -> int:
        """Channels of the embeddings."""
        return self.pairs.signal["width"]

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        """The teacher's, as it was when the cache was built."""
        return torch.tensor(self.pairs.signal["logit_scale"])

    @property
    def logit_bias(self) -> Float[Tensor, ""] | None:
        """The teacher's, as it was when the cache was built."""
        bias = self.pairs.signal["logit_bias"]
        return None if bias is None else torch.tensor(bias)

    def for_preparing(self) -> "CachedEncoder":
        """Itself: the cache is opened again in other processes."""
        return self

    def save(self, folder: str | Path) -> None:
        """There is no model to save."""
        self._no_model()

    def _no_model(self) -> NoReturn:
        raise UserError(
            f"The teacher {self.name} is a cache of embeddings, which has those of its own pairs only. Name the model."
        )


def _inputs(rows: Sequence[np.ndarray]) -> dict[str, Tensor]:
    return {_EMBEDDING: torch.from_numpy(np.stack(rows))}
