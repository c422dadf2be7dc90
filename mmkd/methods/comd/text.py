"""How alike two texts are."""

import re
from collections.abc import Sequence

# Scripts without spaces between words: each character counts as a word.
_ALONE = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def normalised(text: str) -> str:
    """A text without what does not change what it says here: case, runs of white space, a full stop at the end."""
    return " ".join(text.casefold().split()).removesuffix(".").strip()


def rouge_l(first: Sequence[str], second: Sequence[str]) -> float:
    """ROUGE-L of two lists of words: the F measure of their longest common subsequence, between 0 and 1 (Lin 2004)."""
    if not first or not second:
        return 0.0
    return 2 * _common(first, second) / (len(first) + len(second))


def nearest(text: Sequence[str], others: Sequence[Sequence[str]], above: float) -> int | None:
    """The place of the first of `others` whose ROUGE-L to a text lies above a bound, None if there is none."""
    distinct = set(text)
    for place, other in enumerate(others):
        # No common subsequence is longer than the shorter text, or has words that one side lacks.
        bound = 2 * min(len(text), len(other)) / max(1, len(text) + len(other))
        if bound > above and not distinct.isdisjoint(other) and rouge_l(text, other) > above:
            return place
    return None


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence, one machine operation per word (Hyyro 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    everything = (1 << len(first)) - 1
    free = everything
    for word in second:
        matched = free & places.get(word, 0)
        free = ((free + matched) | (free - matched)) & everything
    return len(first) - free.bit_count()
