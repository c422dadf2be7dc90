"""Markers: the special tokens and role headers between the texts of a conversation, paired across two tokenizers.

Other libraries keep a table per model family. Here the chat template is rendered with contents that cannot occur in
it, and the text between these contents gives the markers.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from .pieces import TokenPieces, Tokens, ragged_ranges

Markers = Mapping[str, Iterable[tuple[int, ...]]]
"""A role (bos, pad, eos, user, end of user, ...) -> the token sequences that mark it."""


def markers_of(tokenizer: Any) -> dict[str, set[tuple[int, ...]]]:
    """The markers of a tokenizer, from its special tokens and, if it has one, its chat template.

    A header has the name of the role that it introduces; the marker after a message is called "end of" the role. A
    marker that a template writes in plain text is found only where it is tokenised as it is on its own.
    """
    named = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    markers = {role: {(index,)} for role, index in named.items() if index is not None}
    if tokenizer.chat_template is None:
        return markers
    texts = _template_texts(tokenizer)
    if any(text.startswith(tokenizer.bos_token or " ") for role, text in texts if not role.startswith("end")):
        # A role header begins with the token called bos, so that the token does not mark the beginning of a text.
        markers.pop("bos", None)
    for role, text in texts:
        # A space before a text is tokenised with the text. The newline after the end of a message may be missing.
        for spelling in {text.rstrip(" "), text.rstrip() if role.startswith("end") else text.rstrip(" ")}:
            if spelling.strip():
                ids = tokenizer(spelling, add_special_tokens=False)["input_ids"]
                markers.setdefault(role, set()).add(tuple(ids))
    return markers


def _template_texts(tokenizer: Any) -> list[tuple[str, str]]:
    """Pairs of a role and a text that the chat template writes for it; some texts are empty."""
    talk = _between(tokenizer, "user", "assistant", "user", "assistant")
    question, prompt = _between(tokenizer, "user"), _between(tokenizer, "user", generation=True)
    if not (talk and question and prompt):
        return []
    user_end, assistant_end = question[-1], talk[-1]
    texts = [("end of user", user_end), ("end of assistant", assistant_end)]
    # The last answer may have another header than those before it, for example one with an empty thinking block.
    texts += [("assistant", text.removeprefix(user_end)) for text in (talk[1], talk[3], prompt[-1])]
    user = talk[2].removeprefix(assistant_end)
    texts.append(("user", user))
    if system := _between(tokenizer, "system", "user"):
        bos = tokenizer.bos_token or ""
        texts.append(("system", system[0] if user.startswith(bos) else system[0].removeprefix(bos)))
        if system[1].endswith(user):
            texts.append(("end of system", system[1].removesuffix(user)))
    return texts


def _between(tokenizer: Any, *roles: str, generation: bool = False) -> list[str]:
    """The texts before, between and after messages of these roles; an empty list if the template refuses the roles."""
    contents = [f"Q{i}Z" for i in range(len(roles))]
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    # Templates refuse roles with errors of their own; one without a system role is common.
    except Exception:
        return []
    parts = re.split("|".join(contents), text)
    return parts if len(parts) == len(roles) + 1 else []


@dataclass(frozen=True)
class Occurrences:
    """Where markers stand in rows of tokens, in order: first token, token after the last, kind, row.

    Markers of kind -1 have no counterpart on the other side at all. Hard markers contain an added token, which no text
    is split into: without a partner they are skipped as a whole, while the other markers then count as text.
    """

    starts: Int[ndarray, "marker"]
    stops: Int[ndarray, "marker"]
    kinds: Int[ndarray, "marker"]
    rows: Int[ndarray, "marker"]
    hard: Bool[ndarray, "marker"]

    def __getitem__(self, which: ndarray) -> Self:
        return type(self)(*(getattr(self, field.name)[which] for field in fields(self)))

    def tokens(self) -> Int[ndarray, "token"]:
        """The positions of their tokens."""
        return ragged_ranges(self.starts, self.stops - self.starts)


@dataclass(frozen=True)
class MarkerTable:
    """The token sequences that are markers on one side, longest first; each has a kind shared by both sides, or -1."""

    patterns: tuple[tuple[int, ...], ...]
    kinds: Int[ndarray, "pattern"]
    hard: Bool[ndarray, "pattern"]
    begins: Bool[ndarray, "vocab"]

    def find(self, tokens: Tokens, places: Int[ndarray, "place"]) -> Occurrences:
        """The markers in rows of tokens, without overlaps; `places` are those of the tokens in `begins`."""
        if not len(places):
            return Occurrences(places, places, places, places, places.astype(bool))
        ids = tokens.ids
        rows = np.searchsorted(tokens.rows, places, "right") - 1
        space, which = tokens.rows[rows + 1] - places, np.full(len(places), -1)
        for number, pattern in enumerate(self.patterns):
            open_ = np.flatnonzero((which < 0) & (space >= len(pattern)))
            for offset, token in enumerate(pattern):
                open_ = open_[ids[places[open_] + offset] == token]
            which[open_] = number
        sizes = np.array([len(pattern) for pattern in self.patterns], np.int64)
        keep = which >= 0
        places, rows, which = places[keep], rows[keep], which[keep]
        stops = places + sizes[which]
        if (stops[:-1] > places[1:]).any():
            # Of overlapping markers the first one counts, as a tokenizer reads from left to right.
            kept: list[int] = []
            end = 0
            for i, (start, stop) in enumerate(zip(places.tolist(), stops.tolist(), strict=True)):
                if start >= end:
                    end = stop
                    kept.append(i)
            places, stops, rows, which = places[kept], stops[kept], rows[kept], which[kept]
        return Occurrences(places, stops, self.kinds[which], rows, self.hard[which])


def marker_tables(
    teacher: Markers, student: Markers, teacher_pieces: TokenPieces, student_pieces: TokenPieces
) -> tuple[MarkerTable, MarkerTable]:
    """The tables of both sides. Roles with the same marker on one side (end of user, eos) are one kind on both."""
    sides = ({role: set(ids) for role, ids in teacher.items()}, {role: set(ids) for role, ids in student.items()})
    kind = {role: i for i, role in enumerate(sorted({*teacher, *student}))}
    for side in sides:
        owner: dict[tuple[int, ...], int] = {}
        for role, patterns in side.items():
            for pattern in patterns:
                old, new = kind[role], owner.setdefault(pattern, kind[role])
                kind = {name: new if value == old else value for name, value in kind.items()}
                owner = {key: new if value == old else value for key, value in owner.items()}
    common = {kind[role] for role in sides[0] if sides[0][role]} & {kind[role] for role in sides[1] if sides[1][role]}
    return (_table(sides[0], kind, common, teacher_pieces), _table(sides[1], kind, common, student_pieces))


def _table(
    markers: Mapping[str, set[tuple[int, ...]]], kind: Mapping[str, int], common: set[int], pieces: TokenPieces
) -> MarkerTable:
    kinds = {pattern: kind[role] for role, patterns in markers.items() for pattern in patterns}
    hard = {pattern: bool(pieces.added[list(pattern)].any()) for pattern in kinds}
    usable = [pattern for pattern in kinds if hard[pattern] or kinds[pattern] in common]
    patterns = tuple(sorted(usable, key=lambda pattern: (-len(pattern), pattern)))
    begins = np.zeros(len(pieces), bool)
    begins[[pattern[0] for pattern in patterns]] = True
    shared = [kinds[pattern] if kinds[pattern] in common else -1 for pattern in patterns]
    return MarkerTable(patterns, np.array(shared, np.int64), np.array([hard[p] for p in patterns], bool), begins)


def pair_occurrences(
    teacher: Occurrences,
    student: Occurrences,
    teacher_tokens: Tokens,
    student_tokens: Tokens,
) -> tuple[Int[ndarray, "pair"], Int[ndarray, "pair"]]:
    """Which markers of teacher and student are partners, in order: of one kind and in the same row.

    Where the kinds in a row differ (one template adds a system prompt, or one row is truncated), as many markers as
    possible are paired; pairs with equally many bytes since the marker before are preferred.
    """
    usable = np.flatnonzero(teacher.kinds >= 0), np.flatnonzero(student.kinds >= 0)
    if not (len(usable[0]) and len(usable[1])):
        return usable[0][:0], usable[1][:0]
    left, right = teacher[usable[0]], student[usable[1]]
    if np.array_equal(left.kinds, right.kinds) and np.array_equal(left.rows, right.rows):
        return usable
    items = _kinds_and_texts(left, teacher, teacher_tokens), _kinds_and_texts(right, student, student_tokens)
    pairs: list[tuple[int, int]] = []
    for row in np.intersect1d(left.rows, right.rows):
        begin, end = np.searchsorted(left.rows, [row, row + 1]).tolist()
        other, other_end = np.searchsorted(right.rows, [row, row + 1]).tolist()
        matched = _matched(items[0][begin:end], items[1][other:other_end])
        pairs += [(begin + i, other + j) for i, j in matched]
    chosen = np.array(pairs, np.int64).reshape(-1, 2)
    return usable[0][chosen[:, 0]], usable[1][chosen[:, 1]]


def _kinds_and_texts(markers: Occurrences, everything: Occurrences, tokens: Tokens) -> list[tuple[int, int]]:
    """For each marker its kind and the bytes of text since the one before in its row."""
    lengths = tokens.lengths.copy()
    lengths[everything[everything.hard].tokens()] = 0
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    before = np.where(np.diff(markers.rows, prepend=-1) > 0, tokens.rows[markers.rows], np.roll(markers.stops, 1))
    return list(zip(markers.kinds.tolist(), (ends[markers.starts] - ends[before]).tolist(), strict=True))


def _matched(ours: list[tuple[int, int]], theirs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The heaviest common subsequence of kinds: equal items at both ends first, the others by dynamic programming."""

    def weight(our_item: tuple[int, int], their_item: tuple[int, int]) -> int:
        return (our_item[0] == their_item[0]) * (2 + (our_item[1] == their_item[1]))

    head, least = 0, min(len(ours), len(theirs))
    while head < least and ours[head] == theirs[head]:
        head += 1
    tail = 0
    while tail < least - head and ours[-1 - tail] == theirs[-1 - tail]:
        tail += 1
    left, right = ours[head : len(ours) - tail], theirs[head : len(theirs) - tail]
    best = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i in reversed(range(len(left))):
        for j in reversed(range(len(right))):
            best[i][j] = max(best[i + 1][j], best[i][j + 1], best[i + 1][j + 1] + weight(left[i], right[j]))
    pairs, i, j = [(k, k) for k in range(head)], 0, 0
    while i < len(left) and j < len(right):
        # Of equally heavy ones the earliest, as rows are cut at their end.
        gain = weight(left[i], right[j])
        if gain and best[i][j] == best[i + 1][j + 1] + gain:
            pairs.append((head + i, head + j))
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    return pairs + [(len(ours) - k, len(theirs) - k) for k in range(tail, 0, -1)]
