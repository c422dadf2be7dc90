"""The final answer within a text: in a box, after ####, after "the answer is", or the last number."""

import json
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=[{\d])")
_HASHES = re.compile(r"####\s*(\S[^\n]*)")
_STATED = re.compile(r"\banswer\s*(?:is|are|:|=)+\s*:?\s*(\S[^\n]*)", re.IGNORECASE)
_FRACTION = re.compile(r"(-?)\\[dt]?frac\s*(?:\{\s*(-?[\d,.]+)\s*\}\s*\{\s*(-?[\d,.]+)\s*\}|(\d)\s*(\d))")
# A sign is one only where no number stands before it: 5-3 holds 5 and 3.
_NUMBER = re.compile(
    r"(?<![\d.)])-?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d[\d,]*(?:\.\d+)?)?|(?<!\d)-?\.\d+|\d[\d,]*(?:\.\d+)?"
)
_LETTER = r"(?:\\text\w*\{)?[(\[*]*([A-J])[)\]*}]*(?![\w'])"
_STATED_LETTER = re.compile(rf"\b(?:answer|option|choice)\s*(?:is|are|:|=)*\s*:?\s*{_LETTER}", re.IGNORECASE)
_ONLY_LETTER = re.compile(rf"^\s*{_LETTER}\s*\.?\s*$", re.MULTILINE)
_BEGINNING = re.compile(r"^\s*([A-J])[.):]\s")
_BRACKETED = re.compile(r"\(([A-J])\)")
_FENCED = re.compile(r"```(?:json)?\s*\n(.*?)\n?\s*```", re.DOTALL)


def marked_answer(text: str) -> str | None:
    """What a text marks as its final answer: the last \\boxed{}, else after the last ####, else after "answer is"."""
    boxes = list(boxed(text))
    if boxes:
        return boxes[-1]
    for pattern in (_HASHES, _STATED):
        matches = pattern.findall(text)
        if matches:
            return matches[-1].strip()
    return None


def boxed(text: str) -> Iterator[str]:
    """The contents of all \\boxed{} and \\fbox{} of a text; one whose brace is not closed is none."""
    for match in _BOX.finditer(text):
        start = match.end()
        if text[start] != "{":
            yield text[start]
            continue
        depth = 0
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                yield text[start + 1 : end].strip()
                break


def final_number(text: str) -> Fraction | None:
    """The number that a text ends in: of its marked answer the first one, else the last one of the text."""
    marked = marked_answer(text)
    numbers = [] if marked is None else numbers_in(marked)
    if numbers:
        return numbers[0]
    numbers = numbers_in(text)
    return numbers[-1] if numbers else None


def numbers_in(text: str) -> list[Fraction]:
    """The numbers of a text in order: 1,234.5 and $12, 3/4 and \\frac{3}{4}, with minus signs; 50% is 50."""
    text = text.replace("\u2212", "-").replace("\\$", "").replace("\\%", "").replace("{,}", ",").replace("\\!", "")
    text = _FRACTION.sub(_plain_fraction, text)
    return [value for value in map(_value, _NUMBER.findall(text)) if value is not None]


def _plain_fraction(match: re.Match[str]) -> str:
    above, below = (match[2], match[3]) if match[2] is not None else (match[4], match[5])
    return f" {match[1]}{above}/{below} "


def _value(word: str) -> Fraction | None:
    above, _, below = word.replace(",", "").replace(" ", "").partition("/")
    try:
        return Fraction(above) / Fraction(below or 1)
    except (ValueError, ZeroDivisionError):
        return None


def final_letter(text: str) -> str | None:
    """The letter, A to J, that a text chooses.

    It stands in a box, after "the answer is", alone on a line, in the last brackets, "(B)", or else at the beginning,
    as in "B. Paris".
    """
    for box in reversed(list(boxed(text))):
        letter = re.fullmatch(_LETTER + r".*", box, re.DOTALL)
        if letter is not None:
            return letter[1].upper()
    for pattern in (_STATED_LETTER, _ONLY_LETTER, _BRACKETED, _BEGINNING):
        letters = [letter for letter in pattern.findall(text) if letter.isupper()]
        if letters:
            return letters[-1]
    return None


def final_json(text: str) -> Any:
    """The JSON that a text is, or that its last fenced block holds. Raises ValueError where there is none."""
    blocks = _FENCED.findall(text)
    return json.loads(blocks[-1] if blocks else text, parse_constant=_no_json)


def _no_json(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
