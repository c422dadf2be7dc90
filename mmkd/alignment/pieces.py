"""The bytes that every token of a vocabulary stands for, and the bytes of a text that each of its tokens covers.

A tokenizer may be any object with those members of a transformers tokenizer that are read here.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Int, Int32, UInt8
from numpy import ndarray

from mmkd.errors import UserError

from .normal_form import NormalForm

BOUNDARY_BYTES = b" \t\n"
"""The bytes that begin a new pretoken; special tokens begin one too."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# These remove capitals, accents or spaces from ordinary text, so that pieces do not add up to the text.
_LOSSY_NORMALIZERS = {"BertNormalizer", "Lowercase", "StripAccents"}
_BOUNDARIES = {bytes([byte]) for byte in BOUNDARY_BYTES}
# A sample with many kinds of white space, to see which of them a tokenizer keeps.
_SPACED = "a  b\n\nc\td e "


@dataclass(frozen=True)
class Tokens:
    """Rows of token ids, end to end, and the bytes that each token covers: `data[starts[i] : starts[i] + lengths[i]]`.

    Special tokens cover no bytes. Row r is the tokens from `rows[r]` up to `rows[r + 1]`. The last byte of `data` is a
    zero that no token covers. Tokens cover their pieces, or with `placed` (starts, lengths, data) parts of a text.
    """

    ids: Int[ndarray, "token"]
    rows: Int[ndarray, "row+1"]
    pieces: "TokenPieces"
    placed: tuple[Int[ndarray, "token"], Int[ndarray, "token"], UInt8[ndarray, "byte"]] | None = None

    @property
    def starts(self) -> Int[ndarray, "token"]:
        return self.placed[0] if self.placed else self.pieces.starts.take(self.ids)

    @property
    def lengths(self) -> Int[ndarray, "token"]:
        return self.placed[1] if self.placed else self.pieces.lengths.take(self.ids)

    @property
    def data(self) -> UInt8[ndarray, "byte"]:
        return self.placed[2] if self.placed else self.pieces.data

    def per_row(self, flags: Bool[ndarray, "token"] | None) -> Int[ndarray, "row"]:
        """The number of tokens with the flag in each row; without flags, of all tokens."""
        return np.diff(self.rows if flags is None else running(flags)[self.rows])


@dataclass(frozen=True)
class TokenPieces:
    """The bytes of every token of a vocabulary: none for special tokens, the content for other added tokens.

    With `lossless` false, the pieces of an ordinary text do not add up to it (they lack spaces or capitals), so that
    tokens can only be placed in a text that is passed in. `form` describes what else the tokenizer rewrites. `opening`
    tokens begin a word. `unknown` is the unknown token, whose text cannot be recovered, or -1.
    """

    name: str
    data: UInt8[ndarray, "byte"]
    starts: Int[ndarray, "vocab"]
    lengths: Int[ndarray, "vocab"]
    special: Bool[ndarray, "vocab"]
    added: Bool[ndarray, "vocab"]
    literals: Mapping[int, bytes]
    lossless: bool
    opening: Bool[ndarray, "vocab"]
    unknown: int
    form: NormalForm

    @classmethod
    def of(cls, tokenizer: Any) -> Self:
        """The pieces of a tokenizer: byte-level, SentencePiece, WordPiece or one token per byte.

        Raises UserError for a slow tokenizer whose tokens are not bytes: it offers neither pieces nor offsets.
        """
        name = tokenizer.name_or_path or type(tokenizer).__name__
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(tokenizer.all_special_ids)
        if tokenizer.is_fast:
            spelling = _Spelling.of(json.loads(tokenizer.backend_tokenizer.to_str()))
            # The unknown token stands for some text, although the token does not tell which.
            special.discard(vocabulary.get(spelling.unknown or "", -1))
        elif all(len(token) == 1 and ord(token) < 256 for token, i in vocabulary.items() if i not in added):
            spelling = _Spelling(alphabet={chr(byte): byte for byte in range(256)})
        else:
            raise UserError(
                f"The tokenizer {name} ({type(tokenizer).__name__}) tells neither the bytes of its tokens nor their "
                "position in a text, so nothing can be aligned with it. Load a fast tokenizer (use_fast=True, or a "
                "tokenizer.json), or choose another model.",
                because="not built",
            )
        pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for token, index in vocabulary.items():
            if index not in special and token != spelling.unknown:
                pieces[index] = added[index].encode() if index in added else spelling.piece(token)
        literals = {index: token.encode() for token, index in vocabulary.items() if index in special}
        flags = np.zeros((2, len(pieces)), bool)
        flags[0, list(special)] = flags[1, list(special | added.keys())] = True
        lengths = np.fromiter(map(len, pieces), np.int32, len(pieces))
        data = np.frombuffer(b"".join(pieces) + b"\0", np.uint8)
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        return cls(
            name,
            data,
            starts,
            lengths,
            flags[0],
            flags[1],
            literals,
            spelling.lossless,
            spelling.opening(pieces, vocabulary),
            vocabulary.get(spelling.unknown or "", -1),
            _form_of(tokenizer, pieces, spelling),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> bytes:
        return self.data[self.starts[index] : self.starts[index] + self.lengths[index]].tobytes()

    def spans(
        self,
        ids: Int[ndarray, "token"],
        text: str | None = None,
        offsets: Sequence[tuple[int, int]] | None = None,
    ) -> tuple[Int[ndarray, "token"], Int[ndarray, "token"]]:
        """Where the bytes that each token covers start and end: in the UTF-8 of the text, else in the joined pieces.

        The text may spell special tokens out; they cover nothing. If the pieces do not add up to the text (a
        normaliser changed it), tokens end at the tokenizer's character `offsets`, and each token starts at the end of
        the token before, so that it covers the space in front of it. Raises UserError if offsets are needed and
        missing.
        """
        ids = np.asarray(ids)
        if text is None:
            if not self.lossless:
                raise UserError(
                    f"The pieces of the tokenizer {self.name} lack spaces or capitals of the text. Pass the texts and "
                    "their offsets (return_offsets_mapping=True) too."
                )
            ends = np.cumsum(self.lengths[ids], dtype=np.int64)
            return ends - self.lengths[ids], ends
        placed = self._placed(ids, text.encode())
        if placed is not None:
            return placed
        if offsets is None:
            raise UserError(
                f"The tokens of {self.name} do not add up to their text, which the tokenizer normalises. Pass the "
                f"offsets of this text (return_offsets_mapping=True), or normalise it first: {text[:200]!r}"
            )
        return _spans_of_offsets(np.asarray(offsets, np.int64).reshape(-1, 2), self.special[ids], text)

    def cover(
        self,
        ids: Int[ndarray, "token"],
        lengths: Int[ndarray, "row"],
        texts: Sequence[str] | None = None,
        offsets: Sequence[Sequence[tuple[int, int]]] | None = None,
    ) -> Tokens:
        """Rows of tokens with the bytes that they cover; `ids` are end to end without padding, `lengths` are per row.

        Without texts, tokens cover their pieces even if these are not lossless. Raises UserError as `spans` does.
        """
        ids, rows = np.asarray(ids), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        assert rows[-1] == len(ids), "lengths of rows do not add up to the tokens"
        if texts is None:
            return Tokens(ids, rows, self)
        base, starts, ends = 0, np.empty(len(ids), np.int64), np.empty(len(ids), np.int64)
        for row, text in enumerate(texts):
            tokens = slice(rows[row], rows[row + 1])
            span = self.spans(ids[tokens], text, None if offsets is None else offsets[row])
            starts[tokens], ends[tokens] = span[0] + base, span[1] + base
            base += len(text.encode())
        data = np.frombuffer("".join(texts).encode() + b"\0", np.uint8)
        return Tokens(ids, rows, self, (starts, ends - starts, data))

    def _placed(
        self, ids: Int[ndarray, "token"], text: bytes
    ) -> tuple[Int[ndarray, "token"], Int[ndarray, "token"]] | None:
        """The spans, if the pieces of each run between special tokens add up to the text; else None."""
        starts, ends = np.zeros((2, len(ids)), np.int64)
        place = begin = 0
        for stop in [*np.flatnonzero(self.special[ids]).tolist(), len(ids)]:
            run, lengths = ids[begin:stop], self.lengths[ids[begin:stop]]
            joined = self.data[ragged_ranges(self.starts[run], lengths)].tobytes()
            # SentencePiece adds a space in front of the text.
            extra = 0 if text.startswith(joined, place) else 1
            if extra and not (joined.startswith(b" ") and text.startswith(joined[1:], place)):
                return None
            ends[begin:stop] = np.maximum(np.cumsum(lengths) - extra, 0) + place
            starts[begin:stop] = np.concatenate([[place], ends[begin:stop]])[:-1]
            place += len(joined) - extra
            if stop < len(ids):
                starts[stop] = ends[stop] = place
                literal = self.literals[int(ids[stop])]
                place += len(literal) if text.startswith(literal, place) else 0
            begin = stop + 1
        return starts, ends


def boundary_mask(pieces: TokenPieces) -> Bool[ndarray, "vocab"]:
    """The tokens that begin a new pretoken: with a space, tab or newline, as a new word, or as special tokens."""
    return pieces.special | pieces.opening


def set_sha256(mask: Bool[ndarray, "vocab"]) -> str:
    """The checksum of a set of tokens, by which a cache tells of which set it keeps the probability."""
    return hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()


def spelling_numbers(
    teacher: TokenPieces, student: TokenPieces
) -> tuple[Int32[ndarray, "vocab"], Int32[ndarray, "other_vocab"]]:
    """A number for every token of both vocabularies; tokens with the same bytes have the same number."""
    numbers: dict[bytes, int] = {}
    sides: list[list[int]] = []
    for pieces in (teacher, student):
        data = pieces.data.tobytes()
        spans = zip(pieces.starts.tolist(), (pieces.starts + pieces.lengths).tolist(), strict=True)
        sides.append([numbers.setdefault(data[start:end], len(numbers)) for start, end in spans])
    return np.array(sides[0], np.int32), np.array(sides[1], np.int32)


def running(values: ndarray) -> Int[ndarray, "item+1"]:
    """The sums of the first 0, 1, 2, ... values."""
    sums = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=sums[1:])
    return sums


def ragged_ranges(starts: Int[ndarray, "range"], lengths: Int[ndarray, "range"]) -> Int[ndarray, "item"]:
    """The integers `start, ..., start + length - 1` of all ranges, end to end."""
    # np.concatenate of one np.arange per range costs a Python call each; a batch has thousands of ranges.
    ends = np.cumsum(lengths, dtype=np.int64)
    items = np.repeat(starts - ends + lengths, lengths)
    items += np.arange(len(items))
    return items


def _spans_of_offsets(
    offsets: Int[ndarray, "token 2"], special: Bool[ndarray, "token"], text: str
) -> tuple[Int[ndarray, "token"], Int[ndarray, "token"]]:
    """Byte spans from character offsets, without gaps; a character shared by several tokens belongs to the last."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    starts, ends = np.concatenate([[0], np.cumsum(widths)])[offsets].T
    shared = (starts[1:] < ends[1:]) & (starts[1:] < ends[:-1])
    last = ends.copy()
    last[:-1][shared] = starts[1:][shared]
    last = np.maximum.accumulate(last)
    first = np.concatenate([[0], last])[:-1]
    return np.where(special, last, first), last


@dataclass(frozen=True)
class _Spelling:
    """The way in which a family of tokenizers writes bytes as tokens."""

    alphabet: Mapping[str, int] | None = None
    space: str | None = None
    byte_tokens: bool = False
    prefix: str | None = None
    suffix: str | None = None
    unknown: str | None = None
    lossless: bool = True

    @classmethod
    def of(cls, backend: Mapping[str, Any]) -> Self:
        """The spelling that the JSON of a fast tokenizer describes."""
        # The JSON, because the objects of the tokenizers library do not expose the members of their sequences.
        model = backend["model"]
        parts = {key: _components(backend[key]) for key in ("normalizer", "pre_tokenizer", "decoder")}
        kinds = {key: {part["type"] for part in value} for key, value in parts.items()}
        byte_level = any("ByteLevel" in value for value in kinds.values())
        replaced = [part for part in parts["decoder"] if part["type"] == "Replace" and part["content"] == " "]
        metaspaces = [part for key in parts for part in parts[key] if part["type"] == "Metaspace"]
        spaces = [part["replacement"] for part in metaspaces] + [part["pattern"].get("String") for part in replaced]
        suffix = model.get("end_of_word_suffix") or None
        unknown = model.get("unk_token")
        if model["type"] == "Unigram" and model["unk_id"] is not None:
            unknown = model["vocab"][model["unk_id"]][0]
        return cls(
            alphabet=_byte_alphabet() if byte_level else None,
            space=None if byte_level or not spaces else spaces[0],
            byte_tokens=bool(model.get("byte_fallback")) or "ByteFallback" in kinds["decoder"],
            prefix=model.get("continuing_subword_prefix") or None,
            suffix=suffix,
            unknown=None if byte_level else unknown,
            lossless=(byte_level or bool(spaces))
            and model["type"] in {"BPE", "Unigram"}
            and suffix is None
            and not kinds["normalizer"] & _LOSSY_NORMALIZERS,
        )

    def opening(self, pieces: Sequence[bytes], vocabulary: Mapping[str, int]) -> Bool[ndarray, "vocab"]:
        """The tokens that begin a word, given the pieces of all tokens.

        If a tokenizer marks the ends of words, every token counts, since a token does not tell what it follows.
        """
        opening = np.array([piece[:1] in _BOUNDARIES for piece in pieces], bool)
        if self.suffix:
            opening[:] = True
        elif self.prefix:
            first = [index for token, index in vocabulary.items() if not token.startswith(self.prefix)]
            opening[first] = True
        return opening

    def piece(self, token: str) -> bytes:
        """The bytes of a token of the vocabulary that is not an added token."""
        if self.byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        token = token.removeprefix(self.prefix or "").removesuffix(self.suffix or "")
        if self.alphabet is not None and all(character in self.alphabet for character in token):
            return bytes(self.alphabet[character] for character in token)
        return (token.replace(self.space, " ") if self.space else token).encode()


def _form_of(tokenizer: Any, pieces: Sequence[bytes], spelling: _Spelling) -> NormalForm:
    """The form that the tokenizer rewrites texts to, measured by a sample and its pieces."""
    if not tokenizer.is_fast:
        return NormalForm()
    ids: list[int] = tokenizer(_SPACED, add_special_tokens=False)["input_ids"]
    read = b"".join(pieces[index] for index in ids).decode(errors="replace")
    spaces = ["".join(character for character in text if character.isspace()) for text in (read, _SPACED)]
    # SentencePiece adds a space in front of the text.
    kept = spaces[0] in (spaces[1], f" {spaces[1]}")
    normalizer = tokenizer.backend_tokenizer.normalizer
    return NormalForm.of(normalizer, spaces=not kept, metaspace=spelling.space == "\u2581")


def _components(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The parts of a normalizer, pre-tokenizer or decoder; sequences are flattened."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    # The key of the list depends on the kind: "normalizers", "pretokenizers" or "decoders".
    key = next(key for key, value in part.items() if isinstance(value, list))
    return [leaf for member in part[key] for leaf in _components(member)]


def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level tokenizers write for each byte, as GPT-2 introduced them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(unprintable)}
