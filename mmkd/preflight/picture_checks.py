"""A check of `mmkd doctor` on data of pictures: some of them are opened and decoded."""

from collections.abc import Callable
from typing import Any

import numpy as np

from mmkd.errors import UserError

from .facts import Finding, listed

_READ = 64


def readable_pictures(count: int, read: Callable[[int], Any]) -> list[Finding]:
    """Whether `read`, which raises UserError for a bad one, reads up to 64 pictures drawn at random from so many."""
    places = np.sort(np.random.default_rng(0).permutation(count)[:_READ]).tolist()
    bad: list[str] = []
    for place in places:
        try:
            read(place)
        except UserError as error:
            bad.append(str(error).splitlines()[0])
    if not bad:
        return [Finding("ok", "images", f"{len(places)} of {count:,} pictures, drawn at random, can be read.")]
    text = f"{len(bad)} of {len(places)} pictures, drawn at random, cannot be read: {listed(bad)}"
    return [Finding("problem", "images", text, "Training stops at the first one: correct them.")]
