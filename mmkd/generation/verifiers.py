"""Whether a generated answer is right: its final answer, read by a rule, against the one that is known."""

import hashlib
import importlib
import importlib.metadata
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.data.user_functions import user_function
from mmkd.errors import UserError

from .final_answers import final_json, final_letter, final_number, marked_answer
from .verifier_names import PYTHON

_VERSION = 1
"""Raise it when the same answers get other verdicts: what was verified before is then verified again."""


@dataclass(frozen=True)
class Final:
    """A final answer: its value, whatever the verifier compares, and how it reads."""

    value: Any
    words: str


@dataclass(frozen=True)
class Ruling:
    """What a verifier says of one answer. `right` is None where the row has nothing to compare it with."""

    right: bool | None
    final: Final | None
    gold: str | None = None


class Verifier(ABC):
    """Reads final answers and compares them."""

    name: str
    reads_gold = True
    """Whether it needs the row's own answer."""

    def facts(self) -> dict[str, Any]:
        """What decides its rulings, as plain values."""
        return {"name": self.name, "version": _VERSION}

    @abstractmethod
    def final(self, text: str) -> Final | None:
        """The final answer of a text, without thoughts; None where it has none."""

    def gold(self, value: Any) -> Final | None:
        """The final answer that a row names as right: a value, or a whole solution."""
        return self.final(_as_text(value))

    @abstractmethod
    def same(self, gold: Final, answer: Final) -> bool:
        """Whether two final answers are the same."""

    def rule(self, text: str, row: Mapping[str, Any], gold: Any) -> Ruling:
        """The ruling on an answer to a row, whose own answer is `gold`, None where it has none."""
        answer, known = self.final(text), None if gold is None else self.gold(gold)
        if known is None:
            return Ruling(None, answer)
        return Ruling(answer is not None and self.same(known, answer), answer, known.words)

    def classes(self, answers: Sequence[Final | None]) -> list[int | None]:
        """The class of equal final answers that each is in, as the place of its first; None for none."""
        classes: list[int | None] = []
        for place, answer in enumerate(answers):
            if answer is None:
                classes.append(None)
                continue
            firsts = dict.fromkeys(number for number in classes if number is not None)
            classes.append(next((first for first in firsts if self._alike(answers[first], answer)), place))
        return classes

    def _alike(self, first: Final | None, other: Final) -> bool:
        return first is not None and (first.words == other.words or self.same(first, other))


class NumberVerifier(Verifier):
    """Numbers, exactly: the one in a box, after ####, after "the answer is", or else the last of the text."""

    name = "number"

    def final(self, text: str) -> Final | None:
        number = final_number(text)
        return None if number is None else Final(number, str(number))

    def same(self, gold: Final, answer: Final) -> bool:
        return gold.value == answer.value


class MathVerifier(Verifier):
    """Mathematical expressions, compared by the package math-verify: 1/2 and 0.5, sets, intervals, equations."""

    name = "math"

    def __init__(self):
        try:
            self._package: Any = importlib.import_module("math_verify")
        except ImportError as error:
            raise UserError(
                "cache_verifier: math needs a package: pip install 'mmkd[verify]'. cache_verifier: number compares "
                "plain numbers and fractions without it."
            ) from error

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "math-verify": importlib.metadata.version("math-verify")}

    def final(self, text: str) -> Final | None:
        marked = marked_answer(text)
        # A bare \frac{1}{2} is LaTeX to math-verify only where it is marked as such.
        tries = [] if marked is None else [f"${marked.strip('$ ').rstrip('.')}$", marked]
        return next((final for final in map(self._parsed, [*tries, text]) if final is not None), None)

    def gold(self, value: Any) -> Final | None:
        text = _as_text(value)
        if marked_answer(text) is not None or "\n" in text.strip():
            return self.final(text)
        return self._parsed(f"${text.strip('$ ')}$") or self._parsed(text)

    def same(self, gold: Final, answer: Final) -> bool:
        return bool(self._package.verify(gold.value, answer.value, **self._limit("timeout_seconds")))

    def _parsed(self, text: str) -> Final | None:
        values = self._package.parse(text, **self._limit("parsing_timeout"))
        return Final(values, str(values[-1])) if values else None

    @staticmethod
    def _limit(name: str) -> dict[str, Any]:
        # Its time limits are alarm signals, which only the main thread of a process gets.
        return {} if threading.current_thread() is threading.main_thread() else {name: None}


class ChoiceVerifier(Verifier):
    """The letter of multiple choice, A to J."""

    name = "choice"

    def final(self, text: str) -> Final | None:
        letter = final_letter(text)
        return None if letter is None else Final(letter, letter)

    def same(self, gold: Final, answer: Final) -> bool:
        return gold.value == answer.value


class JsonVerifier(Verifier):
    """JSON: it can be parsed, fits a JSON Schema if there is one, and equals the row's own where that is named."""

    name = "json"

    def __init__(self, schema: Path | None, reads_gold: bool):
        self.reads_gold, self._schema, self._validator = reads_gold, None, None
        if schema is not None:
            self._schema, self._validator = _json_schema(schema)

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "schema": self._schema, "gold": self.reads_gold}

    def final(self, text: str) -> Final | None:
        try:
            value = final_json(text)
        except ValueError:
            return None
        if self._validator is not None and not self._validator.is_valid(value):
            return None
        return Final(value, json.dumps(_with_integers(value), sort_keys=True, ensure_ascii=False))

    def gold(self, value: Any) -> Final | None:
        return self.final(value if isinstance(value, str) else json.dumps(value))

    def same(self, gold: Final, answer: Final) -> bool:
        return gold.words == answer.words

    def rule(self, text: str, row: Mapping[str, Any], gold: Any) -> Ruling:
        if self.reads_gold:
            return super().rule(text, row, gold)
        answer = self.final(text)
        return Ruling(answer is not None, answer)


class FunctionVerifier(Verifier):
    """A function of the user's: function(answer, row) -> True, False, or a score, of which 1 and above is right."""

    reads_gold = False

    def __init__(self, name: str):
        self.name = name
        self._function: Callable[..., Any] = user_function(name.removeprefix(PYTHON), "cache_verifier")

    def facts(self) -> dict[str, Any]:
        code = getattr(self._function, "__code__", None)
        # Its text may change under the same name; what it calls, too, which nobody can see from here.
        digest = None if code is None else hashlib.sha256(code.co_code + repr(code.co_consts).encode()).hexdigest()
        return {**super().facts(), "code": digest}

    def final(self, text: str) -> Final | None:
        return Final(text.strip(), " ".join(text.split())) if text.strip() else None

    def same(self, gold: Final, answer: Final) -> bool:
        return gold.words == answer.words

    def rule(self, text: str, row: Mapping[str, Any], gold: Any) -> Ruling:
        try:
            value = self._function(text, dict(row))
        except Exception as error:
            raise UserError(
                f"cache_verifier {self.name!r} failed on the answer {text[:80]!r}: {type(error).__name__}: {error}. "
                "It is called as function(answer, row) and gives True, False or a score."
            ) from error
        if value is not None and not isinstance(value, bool | int | float) and not hasattr(value, "__float__"):
            raise UserError(f"cache_verifier {self.name!r} gave {value!r}; it must give True, False or a number.")
        return Ruling(None if value is None else float(value) >= 1, self.final(text))


def verifier_named(name: str, schema: str | None = None, gold_column: str | None = None) -> Verifier:
    """The verifier of a recipe. Raises UserError for an unknown one, and for a function or package that is missing."""
    if name.startswith(PYTHON):
        return FunctionVerifier(name)
    if name == "json":
        return JsonVerifier(None if schema is None else Path(schema), gold_column is not None)
    rules: dict[str, Callable[[], Verifier]] = {
        "number": NumberVerifier,
        "math": MathVerifier,
        "choice": ChoiceVerifier,
    }
    return rules[name]()


def _json_schema(path: Path) -> tuple[str, Any]:
    """The checksum of a JSON Schema, and what checks values against it."""
    try:
        from jsonschema import SchemaError, validators
    except ImportError as error:
        raise UserError("cache_json_schema needs a package: pip install 'mmkd[verify]'.") from error
    try:
        content = path.read_bytes()
        schema = json.loads(content)
        kind = validators.validator_for(schema)
        kind.check_schema(schema)
    except (OSError, ValueError, SchemaError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cache_json_schema {path} is no JSON Schema that can be read: {reason}.") from error
    return hashlib.sha256(content).hexdigest(), kind(schema)


def _with_integers(value: Any) -> Any:
    """A JSON value in which 1.0 is written as 1, which is the same number there."""
    if isinstance(value, dict):
        return {key: _with_integers(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_with_integers(own) for own in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
