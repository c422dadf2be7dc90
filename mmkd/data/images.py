"""Images of rows, decoded where their failure can be told: what cannot be read is a row's fault, not the run's."""

import re
import struct
import zlib
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Image, List
from PIL import Image as PILImage

# What PIL's readers raise for broken files; they have no common class below Exception.
UNDECODABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    struct.error,
    zlib.error,
    PILImage.DecompressionBombError,
)


@dataclass(frozen=True)
class UnusableRow:
    """Why a row cannot be read."""

    reason: str


def decoded(feature: Any, image: Mapping[str, Any]) -> PILImage.Image | UnusableRow:
    """An image from its encoded form, or why it cannot be decoded."""
    try:
        return feature.decode_example(image)
    except UNDECODABLE as error:
        # Where in memory its bytes lay is nobody's business, and another place in every build.
        reason = re.sub(r"<[^>]* object at 0x[0-9a-f]+>", "of the row", str(error))
        return UnusableRow(f"{type(error).__name__}: {reason}")


def undecoded(dataset: Dataset) -> Dataset:
    """The same rows with their images as stored: reading one cannot fail, and nothing is copied."""
    if dataset.features.get("images") != List(Image()):
        return dataset
    info = deepcopy(dataset.info)
    assert info.features is not None
    info.features["images"] = List(Image(decode=False))
    # cast_column would rewrite all the files: only for a plain Image does it know that storage stays the same.
    return Dataset(dataset.data, info=info, split=dataset.split, indices_table=dataset._indices)
