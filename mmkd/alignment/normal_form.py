"""Normal forms: the differences that a tokenizer removes, such as decomposed letters, capitals, accents, white space.

Samples are given to a tokenizer to see what it rewrites, because its description may not tell (SentencePiece's
compiled tables). Two texts are then compared in the form that neither side rewrites.
"""

import unicodedata
from dataclasses import dataclass, fields
from functools import cache, lru_cache
from typing import Any, NamedTuple, Self

import numpy as np
from jaxtyping import Int, UInt8
from numpy import ndarray

# One sample for each way in which Unicode composes: accents, singletons, exclusions (Indic), Korean syllables.
_COMPOSITIONS = ("e\u0301", "\u00e9", "\u212b", "\u0958", "\u1112\u1161\u11ab", "\ud55c")
_COMPATIBLE = ("\ufb01", "\u2460", "\uff11")
_INVISIBLE = ("a\u200db", "a\u200bb", "a\x07b", "a\ufeffb")


class Folded(NamedTuple):
    """A text in its normal form, and where in it each byte of the text ends: -1 within a rewritten cluster."""

    data: UInt8[ndarray, "folded"]
    places: Int[ndarray, "byte+1"]


@dataclass(frozen=True)
class NormalForm:
    """The differences to ignore when two spellings of a text are compared.

    `canonical` and `compatible` are Unicode's equivalences (NFC, NFKC), `accents` nonspacing marks, `marks` all marks,
    `case` capitals, `spaces` white space, `invisible` control and format characters. With `metaspace`, the sign that
    SentencePiece writes for a space is a space.
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
        """The form that a normalizer of the tokenizers library (or None) rewrites a text to."""
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
        """UTF-8 in this form; bytes that are not valid UTF-8 stay as they are."""
        # surrogateescape maps an invalid byte to U+DC80 to U+DCFF and back, so that it survives decoding.
        points = np.frombuffer(data.decode("utf-8", "surrogateescape").encode("utf-32-le", "surrogatepass"), np.uint32)
        widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
        # An invalid byte takes one byte, not the three of its surrogate.
        widths[(points >= 0xDC80) & (points <= 0xDCFF)] = 1
        # Each distinct character is looked at once: a batch of texts has few.
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
        parts: list[bytes] = []
        sizes, copied = stops - starts, 0
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
    """A cluster of characters (a letter and the marks that join it) in a form."""
    if form.metaspace:
        text = text.replace("\u2581", " ")
    if form.canonical or form.compatible:
        text = unicodedata.normalize("NFKD" if form.compatible else "NFD", text)
    if form.case:
        text = text.casefold()
    text = "".join(character for character in text if not _dropped(form, character))
    if form.canonical or form.compatible:
        # Compose last: the decomposition may give capitals, and lowering a capital may give a decomposed letter.
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
    """Whether a character may be composed with the characters before it."""
    if _dropped(form, character) and not character.isspace():
        return True
    if not (form.canonical or form.compatible):
        return False
    first = unicodedata.normalize("NFKD" if form.compatible else "NFD", character)[0]
    return unicodedata.combining(first) > 0 or first in _second_parts()


@cache
def _second_parts() -> frozenset[str]:
    """The last characters of compositions: vowels and finals of Korean, signs of Indic scripts."""
    # Characters from U+20000 on have no decomposition into two.
    pairs = (unicodedata.decomposition(chr(point)).split() for point in range(0x20000))
    seconds = {chr(int(pair[1], 16)) for pair in pairs if len(pair) == 2 and not pair[0].startswith("<")}
    return frozenset(seconds | {chr(point) for point in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))})
