"""Which tokens of a vocabulary need which others, and the state of a tokenizer (tokenizer.json) without the rest.

Texts whose tokens are kept, together with what each of these is made of, are cut into the same tokens afterwards:
byte-pair merges that are left out could not have been chosen before one that is kept, a kept token of WordPiece is
still the longest match, and a kept path of Unigram still the likeliest.
"""

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol, cast

from mmkd.errors import UserError

# With byte fallback, also the mark of a space: decoders turn it into one before they join bytes.
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>|▁")
State = dict[str, Any]
"""The content of a tokenizer.json."""


class Family(Protocol):
    """The tokens of one algorithm, by their text."""

    ids: Mapping[str, int]
    always: set[str]
    """Tokens without which it does not work as before, whatever the text: bytes, and the unknown token."""

    def parts(self, token: str) -> set[str]:
        """The tokens that it is merged from."""
        ...

    def letters(self, token: str) -> set[str]:
        """The tokens of its characters, without which they would be unknown."""
        ...

    def model(self, kept: Mapping[str, int]) -> State:
        """The section `model` of the state, with kept tokens and their new ids."""
        ...


class BytePairs:
    """BPE: of bytes, of SentencePiece, or of characters with a mark at the end of a word, as CLIP has."""

    def __init__(self, state: State, byte_letters: Iterable[str]):
        self._model: State = state["model"]
        self.ids: Mapping[str, int] = self._model["vocab"]
        self._prefix: str = self._model.get("continuing_subword_prefix") or ""
        self._suffix: str = self._model.get("end_of_word_suffix") or ""
        self._merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in self._merge_list]
        self._ranks = {pair: rank for rank, pair in enumerate(self._merges)}
        of_bytes = '"ByteLevel"' in str([state.get("normalizer"), state.get("pre_tokenizer")]).replace("'", '"')
        self._knows_all = of_bytes or bool(self._model.get("byte_fallback"))
        letters = set(byte_letters) if of_bytes else set[str]()
        self.always = {name for letter in letters for name in (letter, letter + self._suffix) if name in self.ids}
        if self._model.get("byte_fallback"):
            self.always |= {token for token in self.ids if _BYTE_TOKEN.fullmatch(token)}
        if self._model.get("unk_token") is not None:
            self.always.add(str(self._model["unk_token"]))

    @property
    def _merge_list(self) -> list[Any]:
        return self._model["merges"]

    def _symbols(self, token: str) -> list[str]:
        """The characters of a token, as merges begin with them."""
        starts, ends = bool(self._prefix) and token.startswith(self._prefix), False
        body = token[len(self._prefix) :] if starts else token
        if self._suffix and body.endswith(self._suffix):
            body, ends = body[: -len(self._suffix)], True
        symbols = [self._prefix + letter if number or starts else letter for number, letter in enumerate(body)]
        if ends and symbols:
            symbols[-1] += self._suffix
        return symbols

    def parts(self, token: str) -> set[str]:
        """The tokens of every merge that makes it; none where no merges do, as of whole words with ignore_merges."""
        symbols = self._symbols(token)
        used = set(symbols)
        while len(symbols) > 1:
            pairs = list(pairwise(symbols))
            rank, place = min((self._ranks.get(pair, len(self._ranks)), number) for number, pair in enumerate(pairs))
            if rank == len(self._ranks):
                return set()
            symbols[place : place + 2] = [self._merged(*pairs[place])]
            used.add(symbols[place])
        return used & self.ids.keys() if symbols == [token] else set()

    def _merged(self, left: str, right: str) -> str:
        return left + right.removeprefix(self._prefix)

    def letters(self, token: str) -> set[str]:
        """Its characters; none where bytes stand for any."""
        return set() if self._knows_all else self.ids.keys() & set(self._symbols(token))

    def model(self, kept: Mapping[str, int]) -> State:
        """Vocabulary and merges of kept tokens into kept tokens."""
        inside = [pair for pair in self._merges if all(token in kept for token in (*pair, self._merged(*pair)))]
        strings = bool(self._merge_list) and isinstance(self._merge_list[0], str)
        merges = [" ".join(pair) if strings else list(pair) for pair in inside]
        return {**self._model, "vocab": dict(kept), "merges": merges}


class Unigram:
    """SentencePiece's Unigram, with or without byte fallback."""

    def __init__(self, state: State):
        self._model: State = state["model"]
        scores: list[tuple[str, float]] = self._model["vocab"]
        self._scores = [(token, score) for token, score in scores]
        self.ids: Mapping[str, int] = {token: number for number, (token, _) in enumerate(self._scores)}
        self._knows_all = bool(self._model.get("byte_fallback"))
        # What an unknown character costs is counted from the lowest score.
        self.always: set[str] = {min(self._scores, key=lambda entry: entry[1])[0]} if self._scores else set()
        unknown: int | None = self._model.get("unk_id")
        if unknown is not None:
            self.always.add(self._scores[unknown][0])
        if self._knows_all:
            self.always |= {token for token in self.ids if _BYTE_TOKEN.fullmatch(token)}

    def parts(self, token: str) -> set[str]:
        """None: tokens are no pieces of others."""
        return set()

    def letters(self, token: str) -> set[str]:
        """Its characters; none where bytes stand for any."""
        return set() if self._knows_all else self.ids.keys() & set(token)

    def model(self, kept: Mapping[str, int]) -> State:
        """Kept tokens with their scores."""
        vocabulary = [[token, score] for token, score in self._scores if token in kept]
        unknown = self._model.get("unk_id")
        if unknown is not None:
            unknown = kept[self._scores[unknown][0]]
        return {**self._model, "vocab": vocabulary, "unk_id": unknown}


class Words:
    """WordPiece, and whole words."""

    def __init__(self, state: State):
        self._model: State = state["model"]
        self.ids: Mapping[str, int] = self._model["vocab"]
        self._prefix: str = self._model.get("continuing_subword_prefix") or ""
        self.always = {self._model["unk_token"]} if self._model.get("unk_token") in self.ids else set[str]()

    def parts(self, token: str) -> set[str]:
        """None: the longest match wins, whatever else there is."""
        return set()

    def letters(self, token: str) -> set[str]:
        """Its characters at the beginning of a word and within one."""
        body = token.removeprefix(self._prefix) if self._prefix else token
        return self.ids.keys() & {form for letter in body for form in (letter, self._prefix + letter)}

    def model(self, kept: Mapping[str, int]) -> State:
        """Kept tokens."""
        return {**self._model, "vocab": dict(kept)}


@dataclass(frozen=True)
class Trimmed:
    """The state of a smaller tokenizer, and the old id of each of its tokens."""

    state: State
    old_ids: list[int]


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's tokens: those of its algorithm, and those added to them."""

    state: State
    family: Family
    added: dict[int, str]

    @classmethod
    def of(cls, state: State, byte_letters: Iterable[str]) -> "Vocabulary":
        """That of a tokenizer.json. Raises UserError for an algorithm that is none of BPE, Unigram and WordPiece."""
        kinds: dict[str, Callable[[], Family]] = {
            "BPE": lambda: BytePairs(state, byte_letters),
            "Unigram": lambda: Unigram(state),
            "WordPiece": lambda: Words(state),
            "WordLevel": lambda: Words(state),
        }
        # Files of early versions leave the type out; only BPE has merges.
        kind = state["model"].get("type") or ("BPE" if "merges" in state["model"] else "WordPiece")
        if kind not in kinds:
            raise UserError(
                f"The tokenizer's model is {kind!r}. A vocabulary of {', '.join(kinds)} can be trimmed.",
                because="not built",
            )
        return cls(state, kinds[kind](), {token["id"]: token["content"] for token in state.get("added_tokens") or ()})

    @cached_property
    def ids(self) -> dict[str, int]:
        """Token -> id, added tokens included."""
        return {**self.family.ids, **{token: number for number, token in self.added.items()}}

    @property
    def always(self) -> set[int]:
        """The ids of added and special tokens, and of what the algorithm cannot do without."""
        return {self.family.ids[token] for token in self.family.always} | self.added.keys()

    def closed(self, tokens: Iterable[int]) -> set[int]:
        """These ids and those of all that the tokens are merged from."""
        names = self._names
        closed = set(tokens)
        for token in list(closed):
            if token not in self.added:
                closed |= {self.family.ids[part] for part in self.family.parts(names[token])}
        return closed

    def letters(self, tokens: Iterable[int]) -> set[int]:
        """The ids of characters of these tokens that would be unknown without."""
        names = self._names
        own = [names[token] for token in tokens if token not in self.added]
        return {self.family.ids[letter] for token in own for letter in self.family.letters(token)}

    @cached_property
    def _names(self) -> dict[int, str]:
        return {number: token for token, number in self.ids.items()}

    def without_others(self, kept: set[int]) -> Trimmed:
        """The tokenizer with these tokens only, which are `closed`, in their old order; added ones come last."""
        model = sorted((number, token) for token, number in self.family.ids.items() if number in kept)
        outside = sorted((number, token) for number, token in self.added.items() if token not in self.family.ids)
        old_ids = [number for number, _ in (*model, *outside)]
        new = {old: number for number, old in enumerate(old_ids)}
        state = copy.copy(self.state)
        state["model"] = self.family.model({token: new[number] for number, token in model})
        state["added_tokens"] = [{**token, "id": new[token["id"]]} for token in self.state.get("added_tokens") or ()]
        state["post_processor"] = _renumbered(self.state.get("post_processor"), new)
        if padding := self.state.get("padding"):
            state["padding"] = {**padding, "pad_id": new.get(padding["pad_id"], 0)}
        return Trimmed(state, old_ids)


def _renumbered(value: Any, new: Mapping[int, int]) -> Any:
    """A post-processor with other ids: lists `ids` of templates, and [token, id] of `sep` and `cls`."""
    if isinstance(value, list):
        return [_renumbered(part, new) for part in cast(list[Any], value)]
    if not isinstance(value, dict):
        return value
    section = cast(State, value)
    changed: State = {}
    for key, part in section.items():
        if key == "ids":
            changed[key] = [new[number] for number in part]
        elif key in ("sep", "cls") and isinstance(part, list):
            changed[key] = [part[0], new[part[1]]]
        else:
            changed[key] = _renumbered(part, new)
    return changed
