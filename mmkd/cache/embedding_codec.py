"""A teacher's embeddings of one pair as bytes: of several views of its picture, and of each of its captions."""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from mmkd.data.picture_views import PictureView
from mmkd.errors import UserError

from .sequence_keys import KEY_BYTES, image_hash

EMBEDDINGS = "embeddings"
"""The kind of a cache of embeddings."""

EMBEDDING_DTYPES = ("float16", "float32")
_COUNTS = struct.Struct("<HH")


@dataclass(frozen=True)
class PairEmbeddings:
    """A teacher's embeddings of a pair, of length 1: row i of `firsts` is that of view i of the picture.

    Of a pair of texts the first has one view.
    """

    firsts: Float[np.ndarray, "view width"]
    views: tuple[PictureView, ...]
    captions: Float[np.ndarray, "caption width"]
    keys: tuple[bytes, ...]
    """`text_key` of each caption."""

    def __len__(self) -> int:
        return len(self.firsts) + len(self.captions)

    def caption(self, text: str) -> Float[np.ndarray, "width"]:
        """The embedding of a caption. Raises UserError for one that is not there."""
        key = text_key(text)
        if key not in self.keys:
            raise UserError(
                f"The cache has no embedding of the caption {text!r:.80}, although it knows its pair. Its captions "
                "were changed since: build the cache again, in another folder."
            )
        return self.captions[self.keys.index(key)]


@dataclass(frozen=True)
class EmbeddingCodec:
    """Embeddings of a width, in a type."""

    dtype: str
    width: int
    kind = EMBEDDINGS

    def encode(self, pair: PairEmbeddings) -> bytes:
        """The bytes of a pair."""
        views = b"".join(view.numbers.astype("<f4").tobytes() for view in pair.views)
        vectors = np.concatenate([pair.firsts, pair.captions]).astype(self._stored)
        return _COUNTS.pack(len(pair.firsts), len(pair.captions)) + views + b"".join(pair.keys) + vectors.tobytes()

    def decode(self, blob: memoryview, vectors: int) -> PairEmbeddings:
        """The pair of these bytes, which has so many embeddings. Raises UserError where they are not."""
        firsts, captions = _COUNTS.unpack_from(blob) if len(blob) >= _COUNTS.size else (0, 0)
        start = _COUNTS.size + firsts * 20
        end = start + captions * KEY_BYTES
        if firsts + captions != vectors or len(blob) != end + vectors * self.width * self._stored.itemsize:
            raise UserError(f"{len(blob):,} bytes are not {vectors} embeddings of {self.width} channels.")
        numbers = np.frombuffer(blob[_COUNTS.size : start], dtype="<f4").reshape(firsts, 5)
        keys = tuple(bytes(blob[place : place + KEY_BYTES]) for place in range(start, end, KEY_BYTES))
        values = np.frombuffer(blob[end:], dtype=self._stored).reshape(vectors, self.width).astype(np.float32)
        return PairEmbeddings(values[:firsts], tuple(map(PictureView.of, numbers)), values[firsts:], keys)

    @property
    def _stored(self) -> Any:
        return np.dtype(self.dtype).newbyteorder("<")


def text_key(text: str) -> bytes:
    """What a caption is found by: 16 bytes of blake2b."""
    return hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).digest()


def pair_key(first: Any, captions: Sequence[str]) -> bytes:
    """What a pair is found by: its picture's pixels, or its first text, and all its captions in any order."""
    own = first.encode() if isinstance(first, str) else bytes.fromhex(image_hash(first))
    digest = hashlib.blake2b(len(own).to_bytes(4, "little") + own, digest_size=KEY_BYTES)
    for key in sorted(map(text_key, captions)):
        digest.update(key)
    return digest.digest()
