"""What tokenizers do not tell apart: composed and decomposed letters, capitals, accents, kinds of spaces.

What a tokenizer rewrites is read off by giving it samples, as its description may hide it (SentencePiece's compiled
tables). Two sides are then compared in the form that neither of them rewrites.
"""

import unicodedata
from dataclasses import dataclass, fields
from functools import cache, lru_cache
from typing import Any, NamedTuple, Self

import numpy as np
from jaxtyping import Int, UInt8
from numpy import ndarray

_COMPOSITIONS = ("e\u0301", "\u00e9", "\u212b", "\u0958", "\u1112\u1161\u11ab", "\ud55c")
_COMPATIBLE = ("\ufb01", "\u2460", "\uff11")
_INVISIBLE = ("a\u200db", "a\u200bb", "a\x07b", "a\ufeffb")


class Folded(NamedTuple):
    """A text in its normal form, and where in it each byte of the text ends: -1 within what was rewritten."""

    data: UInt8[ndarray, "folded"]
    places: Int[ndarray, "byte+1"]


@dataclass(frozen=True)
class NormalForm:
    """What does not count when two spellings of a text are compared.

    `canonical` and `compatible` are Unicode's equivalences (NFC, NFKC), `accents` nonspacing marks, `marks` all of
    them, `case` capitals, `spaces` white space, `invisible` control and format characters. With `metaspace` the sign
    that SentencePiece writes for a space is one.
    """

    canonical: bool = False
    compatible: bool = False
    case: bool = False
    accents: bool = False
    marks: bool = False
    spaces: bool = False
    invisible: bool = False
    metaspace: bool = False

    @classmethod
    def of(cls, normalizer: Any, *, spaces: bool, metaspace: bool) -> Self:
        """What a normalizer of the tokenizers library rewrites, if there is one."""
        if normalizer is None:
            return cls(spaces=spaces, metaspace=metaspace)

        def keeps(text: str) -> bool:
            return text in normalizer.normalize_str(text)

        return cls(
            canonical=not all(map(keeps, _COMPOSITIONS)),
            compatible=not all(map(keeps, _COMPATIBLE)),
            case=not keeps("A"),
            accents="\u0301" not in unicodedata.normalize("NFD", normalizer.normalize_str("e\u0301")),
            marks=not keeps("\u0915\u093e"),
            spaces=spaces,
            invisible=not all(map(keeps, _INVISIBLE)),
            metaspace=metaspace,
        )

    def __or__(self, other: "NormalForm") -> "NormalForm":
        pairs = {field.name: getattr(self, field.name) or getattr(other, field.name) for field in fields(self)}
        return NormalForm(**pairs)

    def fold(self, data: bytes) -> Folded:
        """UTF-8 in this form; bytes that are no text stand for themselves."""
        points = np.frombuffer(data.decode("utf-8", "surrogateescape").encode("utf-32-le", "surrogatepass"), np.uint32)
        widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
        # What was no UTF-8: a byte each.
        widths[(points >= 0xDC80) & (points <= 0xDCFF)] = 1
        kinds, which = np.unique(points, return_inverse=True)
        characters = [chr(point) for point in kinds]
        joining = np.array([_joins(self, character) for character in characters], bool)[which]
        joining[:1] = False
        plain = np.array([_folded(self, character) == character for character in characters], bool)[which]
        begins = np.flatnonzero(~joining)
        plain = plain[begins] & (np.diff(begins, append=len(points)) == 1)
        if plain.all():
            return Folded(np.frombuffer(data, np.uint8), np.arange(len(data) + 1))
        starts = (np.cumsum(widths) - widths)[begins]
        stops = np.append(starts[1:], len(data))
        sizes, copied = stops - starts, 0
        parts: list[bytes] = []
        for number in np.flatnonzero(~plain).tolist():
            start, stop = int(starts[number]), int(stops[number])
            part = _folded(self, data[start:stop].decode("utf-8", "surrogateescape"))
            parts += [data[copied:start], part.encode("utf-8", "surrogateescape")]
            sizes[number], copied = len(parts[-1]), stop
        parts.append(data[copied:])
        ends = np.cumsum(sizes)
        cluster = np.repeat(np.arange(len(begins)), stops - starts)
        after = np.arange(1, len(data) + 1)
        within = np.where(plain[cluster], (ends - sizes)[cluster] + after - starts[cluster], -1)
        places = np.where(after == stops[cluster], ends[cluster], within)
        return Folded(np.frombuffer(b"".join(parts), np.uint8), np.concatenate([[0], places]))


@lru_cache(maxsize=1 << 16)
def _folded(form: NormalForm, text: str) -> str:
    """A cluster of characters (a letter and what joins it) in a form."""
    if form.metaspace:
        text = text.replace("\u2581", " ")
    if form.canonical or form.compatible:
        text = unicodedata.normalize("NFKD" if form.compatible else "NFD", text)
    if form.case:
        text = text.casefold()
    text = "".join(character for character in text if not _dropped(form, character))
    if form.canonical or form.compatible:
        # Capitals may come from the decomposition, and decompositions from small letters.
        text = unicodedata.normalize("NFKC" if form.compatible else "NFC", text)
    return text


def _dropped(form: NormalForm, character: str) -> bool:
    if character.isspace():
        return form.spaces
    kind = unicodedata.category(character)
    return (
        (form.marks and kind.startswith("M"))
        or (form.accents and kind == "Mn")
        or (form.invisible and (kind in ("Cc", "Cf") or character == "\ufffd"))
    )


@lru_cache(maxsize=1 << 16)
def _joins(form: NormalForm, character: str) -> bool:
    """Whether a character may become one with those before it."""
    if _dropped(form, character) and not character.isspace():
        return True
    if not (form.canonical or form.compatible):
        return False
    first = unicodedata.normalize("NFKD" if form.compatible else "NFD", character)[0]
    return unicodedata.combining(first) > 0 or first in _second_parts()


@cache
def _second_parts() -> frozenset[str]:
    """The characters that a composed one ends with: vowels and finals of Korean, signs of Indic scripts."""
    pairs = (unicodedata.decomposition(chr(point)).split() for point in range(0x20000))
    seconds = {chr(int(pair[1], 16)) for pair in pairs if len(pair) == 2 and not pair[0].startswith("<")}
    return frozenset(seconds | {chr(point) for point in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))})
