"""Keys of the sequences that a teacher scores: hashes of tokens, mask and images."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from mmkd.data.images import STORED

KEY_BYTES = 16


def sequence_key(
    ids: Int[np.ndarray, "token"], supervised: Bool[np.ndarray, "token"], images: Sequence[str] = ()
) -> bytes:
    """The key of a sequence: 16 bytes of blake2b over token ids, mask and image hashes.

    Two sequences with the same key get the same scores from the same teacher. The first token, which nothing predicts,
    never counts as supervised.
    """
    mask = np.array(supervised, dtype=bool)
    mask[:1] = False
    digest = hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=KEY_BYTES)
    digest.update(np.packbits(mask).tobytes())
    for image in images:
        digest.update(bytes.fromhex(image))
    return digest.digest()


def image_hash(image: Any) -> str:
    """sha256 (hex) over the pixels, size and mode of a PIL image.

    If `read_image` converted a picture to RGB without a visible change (a grey one, for example), the hash is that of
    the original mode: caches that were built before all pictures were read in RGB have this hash.
    """
    image = image.info.get(STORED, image)
    # The pixels of a palette image are indices that mean something only with its palette.
    image = image.convert("RGBA") if image.mode in ("P", "PA") else image
    digest = hashlib.sha256(f"{image.mode} {image.size}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def segments(starts: Iterable[int], length: int) -> Iterator[slice]:
    """The sequences of a packed row, given the positions at which they start."""
    bounds = [*starts, length]
    for start, stop in pairwise(bounds):
        yield slice(start, stop)
