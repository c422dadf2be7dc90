"""The tokens of an old vocabulary that make up each token of a new one, to initialise the new rows of embeddings."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from .markers import markers_of
from .pieces import TokenPieces


@dataclass(frozen=True)
class TokenRows:
    """The old tokens whose mean row initialises each new token: the next `lengths[token]` of `pieces`, or none.

    `old` are the old tokens that have a row, `special` the new special tokens.
    """

    pieces: Int[ndarray, "piece"]
    lengths: Int[ndarray, "row"]
    old: Int[ndarray, "old"]
    special: frozenset[int]

    @classmethod
    def of(
        cls, old_tokens: Mapping[int, Sequence[int]], size: int, old: Iterable[int], special: Iterable[int]
    ) -> Self:
        """The value for the new tokens below `size`, from the list of old tokens of each."""
        lists = [old_tokens.get(index, ()) for index in range(size)]
        lengths = np.fromiter(map(len, lists), np.int64, size)
        pieces = np.fromiter((piece for pieces in lists for piece in pieces), np.int64, int(lengths.sum()))
        return cls(pieces, lengths, np.array(sorted(old), np.int64), frozenset(special))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def copied(self) -> int:
        """The number of new tokens that are one old token."""
        return int((self.lengths == 1).sum())

    @property
    def averaged(self) -> int:
        """The number of new tokens that are the mean of several old tokens."""
        return int((self.lengths > 1).sum())

    @property
    def random(self) -> int:
        """The number of new tokens without an old token, which start at random."""
        return int((self.lengths == 0).sum())

    def copies(self, old: int | None) -> list[int]:
        """The new tokens that are a copy of this old token, ascending."""
        firsts = self.pieces[(np.cumsum(self.lengths) - self.lengths)[self.lengths == 1]]
        return np.flatnonzero(self.lengths == 1)[firsts == (-1 if old is None else old)].tolist()


def token_rows(source: Any, target: Any, rows: int | None = None) -> TokenRows:
    """The tokens of `target` in terms of tokens of `source`; source tokens from `rows` on have no row.

    The first match counts: the special token of the same role (bos first, then the markers of turns in the chat
    templates, then eos and pad); the token of the same bytes; the tokens that the source splits its text into. Raises
    UserError as `TokenPieces.of` does.
    """
    old, new = TokenPieces.of(source), TokenPieces.of(target)
    old_vocabulary, new_vocabulary = source.get_vocab(), target.get_vocab()
    usable = {index for index in old_vocabulary.values() if rows is None or index < rows}
    matched = _equal_tokens(old_vocabulary, new_vocabulary, old, new)
    unmatched = {
        index: new.literals.get(index) or new[index] for index in new_vocabulary.values() if index not in matched
    }
    old_tokens: dict[int, Sequence[int]] = {**_splits(source, old, unmatched)}
    old_tokens |= {index: [match] for index, match in matched.items()}
    old_tokens |= {index: [match] for index, match in _equal_roles(source, target, old, new).items()}
    old_tokens = {index: [piece for piece in pieces if piece in usable] for index, pieces in old_tokens.items()}
    return TokenRows.of(old_tokens, len(new), usable, np.flatnonzero(new.special).tolist())


def missing_specials(source: Any, target: Any) -> list[Any]:
    """The special tokens (AddedToken) of `source` that the chat template of `target` writes and `target` lacks."""
    written = [target.decode(list(ids)) for patterns in markers_of(target).values() for ids in patterns]
    text = "\n".join([str(target.chat_template), *written])
    present = {token.content for token in target.added_tokens_decoder.values()}
    added = [token for _, token in sorted(source.added_tokens_decoder.items())]
    return [token for token in added if token.special and token.content in text and token.content not in present]


def _equal_tokens(
    old_vocabulary: Mapping[str, int], new_vocabulary: Mapping[str, int], old: TokenPieces, new: TokenPieces
) -> dict[int, int]:
    by_bytes: dict[bytes, int] = {}
    # A byte may have two tokens: itself and its byte fallback (<0x41>). The shorter name is the one that texts use.
    for _, index in sorted(old_vocabulary.items(), key=lambda item: (-len(item[0]), -item[1])):
        if old.lengths[index]:
            by_bytes[old[index]] = index
    matched: dict[int, int] = {}
    for token, index in new_vocabulary.items():
        same = old_vocabulary.get(token)
        if same is not None and old[same] == new[index]:
            matched[index] = same
        elif new[index] in by_bytes:
            matched[index] = by_bytes[new[index]]
    return matched


def _splits(source: Any, old: TokenPieces, new_bytes: Mapping[int, bytes]) -> dict[int, list[int]]:
    """The old tokens that the bytes of each new token are split into.

    By the tokenizer, or where its tokens do not add up to the bytes, by the longest match first.
    """
    texts = [data.decode(errors="replace") for data in new_bytes.values()]
    splits: list[list[int]] = source(texts, add_special_tokens=False)["input_ids"] if texts else []
    by_bytes = {old[index]: index for index in np.flatnonzero(old.lengths)[::-1].tolist()}
    result: dict[int, list[int]] = {}
    for (index, data), ids in zip(new_bytes.items(), splits, strict=True):
        read = b"".join(old.literals.get(piece) or old[piece] for piece in ids)
        result[index] = ids if read == data else _longest_first(data, by_bytes)
    return result


def _longest_first(data: bytes, by_bytes: Mapping[bytes, int]) -> list[int]:
    tokens: list[int] = []
    place = 0
    while place < len(data):
        stop = next((stop for stop in range(len(data), place, -1) if data[place:stop] in by_bytes), None)
        if stop is not None:
            tokens.append(by_bytes[data[place:stop]])
        place = place + 1 if stop is None else stop
    return tokens


def _equal_roles(source: Any, target: Any, old: TokenPieces, new: TokenPieces) -> dict[int, int]:
    ours, theirs = markers_of(source), markers_of(target)
    # `markers_of` gives no bos where role headers begin with it, but it is still the best match for the other bos.
    if source.bos_token_id is not None:
        ours["bos"] = {(source.bos_token_id,)}
    if target.bos_token_id == target.eos_token_id:
        theirs.pop("bos", None)
    # A padding token is never a label: as a copy of eos it would take half of eos's probability.
    if source.pad_token_id in (source.bos_token_id, source.eos_token_id):
        ours.pop("pad", None)
    turns = sorted(theirs.keys() - {"bos", "eos", "pad"}, key=lambda role: (role != "end of assistant", role))
    matches: dict[int, int] = {}
    for role in ["bos", *turns, "eos", "pad"]:
        if not (theirs.get(role) and ours.get(role)):
            continue
        for pattern in sorted(theirs[role], key=lambda ids: (len(ids), ids)):
            for index, match in _paired_specials(pattern, ours[role], old, new):
                matches.setdefault(index, match)
    return matches


def _paired_specials(
    pattern: tuple[int, ...], candidates: Iterable[tuple[int, ...]], old: TokenPieces, new: TokenPieces
) -> list[tuple[int, int]]:
    """Pairs of the special tokens of a marker and of its most similar counterpart, in order."""

    def added(ids: tuple[int, ...], pieces: TokenPieces) -> list[int]:
        return [index for index in ids if pieces.special[index]]

    new_specials, spelling = added(pattern, new), [new.literals[index] for index in added(pattern, new)]

    def unlikeness(ids: tuple[int, ...]) -> tuple[Any, ...]:
        old_specials = added(ids, old)
        return (
            abs(len(old_specials) - len(new_specials)),
            [old.literals[index] for index in old_specials] != spelling,
            len(ids),
            ids,
        )

    best = min(candidates, key=unlikeness)
    old_specials = added(best, old)
    # One template may end a header with a special token where the other uses a newline.
    if old_specials and len(new_specials) == len(old_specials) + 1 and not old.special[best[-1]]:
        old_specials.append(best[-1])
    return list(zip(new_specials, old_specials, strict=False))
