"""Names for what a teacher was asked: the tokens of one sequence, which of them count, and the images."""

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

    Two sequences with one key get the same answer from the same teacher. The first token is predicted by nothing.
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

    Of one that `read_image` brought into RGB without changing a pixel, such as a grey one, those that its file has:
    caches from before all pictures were read in RGB know it by them.
    """
    image = image.info.get(STORED, image)
    # The pixels of a palette image are places in a palette of its own.
    image = image.convert("RGBA") if image.mode in ("P", "PA") else image
    digest = hashlib.sha256(f"{image.mode} {image.size}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def segments(starts: Iterable[int], length: int) -> Iterator[slice]:
    """The sequences of a packed row from where they begin: each sees itself alone."""
    bounds = [*starts, length]
    for start, stop in pairwise(bounds):
        yield slice(start, stop)
