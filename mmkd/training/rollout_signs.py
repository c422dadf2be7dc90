"""Signs of a rollout that goes wrong: it repeats itself, or it is written in another script."""

import functools
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence

NGRAM = 4
"""Tokens of a repeated sequence, as in seq-rep-4 (Welleck et al. 2020, arXiv:1908.04319)."""
REPEATED = 0.5
"""Share of a rollout's n-grams that stood in it before, from which on it repeats itself."""
SHORTEST = 16
"""Tokens of the shortest rollout that can repeat itself."""
FOREIGN = 0.1
"""Share of a rollout's letters in other scripts, from which on it is written in another one."""


def repeats_itself(ids: Sequence[int]) -> bool:
    """Whether at least half of a rollout's sequences of four tokens stood in it before."""
    return len(ids) >= SHORTEST and repeated_share(ids) >= REPEATED


def repeated_share(ids: Sequence[int]) -> float:
    """The share of the sequences of four tokens that stood in an answer before."""
    ngrams = list(zip(*(ids[start:] for start in range(NGRAM)), strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def in_other_script(text: str, known: str) -> bool:
    """Whether at least a tenth of a text's letters are of scripts that another text has none of.

    Languages that share a script are not told apart. A known text without letters tells nothing, and nothing is other.
    """
    counts, scripts = _scripts(text), {*_scripts(known)}
    if not counts or not scripts:
        return False
    foreign = sum(count for script, count in counts.items() if not _is_known(script, scripts))
    return foreign >= FOREIGN * counts.total()


def _scripts(text: str) -> Counter[str]:
    """How many letters of each script a text has. Letters for formulas and wide ones count as the plain ones."""
    letters = (letter for letter in unicodedata.normalize("NFKC", text) if letter.isalpha())
    return Counter(map(_script_of, letters))


@functools.lru_cache(maxsize=65536)
def _script_of(letter: str) -> str:
    """The script of a letter: the first word of its name in Unicode."""
    name = unicodedata.name(letter, "").split(" ")[0]
    return "KANA" if name in ("HIRAGANA", "KATAKANA") else name


def _is_known(script: str, known: Collection[str]) -> bool:
    # Japanese and Korean are also written in Chinese characters.
    return script in known or (script == "CJK" and not {"KANA", "HANGUL"}.isdisjoint(known))
