"""What the fields of a dataclass may hold, declared once: types by annotation, ranges by `Range`, choices by metadata.

A range stands in the annotation and not in the metadata, which transformers' and trl's parsers hand on to argparse.
"""

import difflib
import functools
import math
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from enum import Enum
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from mmkd.errors import UserError

_NO = {
    int: "no whole number (int)",
    float: "no number (float)",
    bool: "neither true nor false",
    str: "no text. Put it in quotes if it is a name",
    list: "no list",
    dict: "no mapping of names to values",
}
_A = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list", dict: "a mapping"}
_TAKES = {int: "whole number", float: "number", bool: "true | false", str: "text", list: "list", dict: "mapping"}
TRUTH = {"true": True, "yes": True, "t": True, "y": True, "1": True}
TRUTH |= {"false": False, "no": False, "f": False, "n": False, "0": False}
_JSON_TYPES: dict[Any, str] = {int: "integer", float: "number", bool: "boolean", str: "string"}
_JSON_TYPES |= {list: "array", dict: "object"}
# More choices than these are not listed in an error, and longer values are cut.
_SHOWN_CHOICES, _SHOWN_LETTERS = 12, 80
# What torch and Arrow hold a whole number in.
_LARGEST = 2**63 - 1


@dataclass(frozen=True)
class Range:
    """The numbers that a field takes: finite ones between bounds, of which `min` and `max` belong to it."""

    min: float | None = None
    above: float | None = None
    max: float | None = None
    below: float | None = None
    finite: bool = True

    def __contains__(self, number: float) -> bool:
        """Whether a number lies in it; nan never does."""
        return (
            not math.isnan(number)
            and (math.isfinite(number) or not self.finite)
            and (self.min is None or number >= self.min)
            and (self.above is None or number > self.above)
            and (self.max is None or number <= self.max)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        """What to give instead of a number outside of it."""
        lower, upper = (self.min, self.above), (self.max, self.below)
        if upper == (None, None) and self.min is not None:
            return f"{self.min} or more"
        starts = ["from {}", "above {}"]
        ends = ["to {}" if self.min is not None else "up to {}", "below {}"]
        low = [text.format(bound) for text, bound in zip(starts, lower, strict=True) if bound is not None]
        high = [text.format(bound) for text, bound in zip(ends, upper, strict=True) if bound is not None]
        joint = " " if high and high[0].startswith("to") else " and "
        return " ".join(["a finite number" if not low + high else "a number", joint.join(low + high)]).strip()


Share = Annotated[float, Range(min=0, max=1)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(min=0)]
PositiveInt = Annotated[int, Range(min=1)]
NonNegativeInt = Annotated[int, Range(min=0)]
_FINITE = Range()


@dataclass(frozen=True)
class Field:
    """What one field may hold."""

    name: str
    kinds: tuple[Any, ...]
    """The members of its annotation, which is a union of these."""
    bounds: Range = _FINITE
    choices: Collection[Any] = ()
    """As declared: a table of names may still grow."""
    items: "Field | None" = None
    """Of those that take a list: what its items are."""

    @classmethod
    def of(cls, name: str, hint: Any, choices: Collection[Any] = (), bounds: Range = _FINITE) -> "Field":
        """The field of an annotation, with `Annotated` left in it."""
        members: list[Any] = []
        waiting = [hint]
        while waiting:
            member = waiting.pop(0)
            if get_origin(member) is Annotated:
                bounds = next((part for part in member.__metadata__ if isinstance(part, Range)), bounds)
                waiting.insert(0, member.__origin__)
            elif get_origin(member) in (Union, UnionType):
                waiting = [*get_args(member), *waiting]
            else:
                members.append(member)
        choices = choices or tuple(
            value
            for member in members
            for value in (
                get_args(member)
                if get_origin(member) is Literal
                else [choice.value for choice in member]
                if isinstance(member, type) and issubclass(member, Enum)
                else ()
            )
        )
        held = next((member for member in members if get_origin(member) in (list, tuple)), None)
        items = None if held is None else cls.of(name, get_args(held)[0], choices, bounds)
        return cls(name, tuple(_plain(member) for member in members), bounds, choices, items)

    @property
    def optional(self) -> bool:
        """Whether it may hold nothing."""
        return NoneType in self.kinds or Any in self.kinds

    @property
    def is_text(self) -> bool:
        """Whether its value, or each item of its list, is text, and no number or truth value."""
        kinds = {*self.kinds, *(() if self.items is None else self.items.kinds)}
        return str in kinds and kinds.isdisjoint({bool, int, float, Any})

    def described(self, most_choices: int = _SHOWN_CHOICES) -> str:
        """What it takes, in a few words; more than `most_choices` choices are counted."""
        if self.choices:
            kinds = [str(getattr(choice, "value", choice)) for choice in self.choices]
            kinds = kinds if len(kinds) <= most_choices else [f"one of {len(kinds)} values"]
        elif self.items is not None and list in self.kinds:
            return f"list: {self.items.described(most_choices)}"
        else:
            kinds = [_TAKES.get(kind, _name(kind)) for kind in self.kinds if kind is not NoneType]
            # What others declare as a mapping or text is a mapping in YAML, and text on a command line.
            kinds = ["mapping"] if dict in self.kinds and {*self.kinds} <= {dict, str, NoneType} else kinds
        text = " | ".join(dict.fromkeys(kinds))
        numbers = not {int, float}.isdisjoint(self.kinds) and self.bounds != _FINITE
        if not numbers:
            return text
        within = str(self.bounds)
        return f"{text} {within.removeprefix('a number ')}" if within.startswith("a ") else f"{text}, {within}"

    def check(self, value: Any, where: str = "") -> None:
        """Raises UserError for a value of another type, none of the choices, or a number out of range."""
        name = f"{where}{self.name}"
        if value is None and self.optional:
            return
        if self.items is not None and list in self.kinds and isinstance(value, list | tuple):
            for number, item in enumerate(value):
                replace(self.items, name=f"{self.name}[{number}]").check(item, where)
            return
        if not any(_is_of(value, kind) for kind in self.kinds):
            raise UserError(self._other_type(name, value))
        if self.choices and isinstance(value, str) and value not in self.choices:
            raise UserError(no_choice(name, value, self.choices))
        if isinstance(value, Real) and not isinstance(value, bool):
            if isinstance(value, Integral) and abs(int(value)) > _LARGEST:
                raise UserError(f"{name} is {shown(value)}, which no computer counts to. Give a smaller number.")
            if float(value) not in self.bounds:
                omit = ", or null" if self.optional else ""
                raise UserError(f"{name} is {value}; give {self.bounds}{omit}.")

    def read(self, value: Any, where: str = "") -> Any:
        """The value that a recipe's YAML or a flag gives it. Raises UserError as `check` does."""
        if self.items is not None and not isinstance(value, list) and not (value is None or isinstance(value, dict)):
            value = [self.items.read(value, where)] if str not in self.kinds else self._converted(value)
        elif self.items is not None and isinstance(value, list):
            items = (replace(self.items, name=f"{self.name}[{number}]") for number in range(len(value)))
            value = [field.read(item, where) for field, item in zip(items, value, strict=True)]
        else:
            value = self._converted(value)
        self.check(value, where)
        return value

    def _converted(self, value: Any) -> Any:
        if isinstance(value, str):
            if bool in self.kinds and value.lower() in TRUTH and value not in self.choices:
                return TRUTH[value.lower()]
            for kind in (kind for kind in (int, float) if kind in self.kinds):
                try:
                    return kind(value)
                except ValueError:
                    continue
        elif isinstance(value, int) and str(value) in TRUTH and bool in self.kinds and int not in self.kinds:
            return bool(value)
        return value

    def _other_type(self, name: str, value: Any) -> str:
        kinds = [kind for kind in self.kinds if kind is not NoneType]
        if isinstance(value, bool) and self.choices:
            return f'{name} is {value}: YAML reads no, off, yes and on as truth values. Put the word in quotes: "no".'
        if value is None:
            return f"{name} is null, and it needs a value."
        if isinstance(value, Mapping) and dict in kinds:
            strange = next(key for key in value if not isinstance(key, str))
            return f"{name} has the name {strange!r}, which YAML reads as no text: put it into quotes."
        if self.choices:
            return no_choice(name, value, self.choices)
        if len(kinds) == 1:
            return f"{name} is {shown(value)}, which is {_NO.get(kinds[0], f'no {_name(kinds[0])}')}."
        return f"{name} is {shown(value)}; give {' or '.join(_A.get(kind, _name(kind)) for kind in kinds)}."


def as_json_schema(field: Field) -> dict[str, Any]:
    """What JSON Schema (draft 2020-12) says of a field, null left to the caller.

    Where `Field.read` also takes a value in another spelling, such as "0.5" in quotes for 0.5, the schema is stricter.
    """
    if field.items is not None and list in field.kinds:
        items = as_json_schema(field.items)
        # One value is a list of one.
        alternatives = [{"type": "array", "items": items}, items]
        text = {"type": "string"}
        return {"anyOf": alternatives if str not in field.kinds or text in alternatives else [*alternatives, text]}
    choices = [str(getattr(choice, "value", choice)) for choice in field.choices]
    if choices:
        return {"enum": choices}
    types = [_JSON_TYPES[kind] for kind in field.kinds if kind in _JSON_TYPES]
    if Any in field.kinds:
        return {}
    if not types:
        # A type of Python, which no YAML value is.
        return {"not": {}}
    schema: dict[str, Any] = {"type": types[0] if len(types) == 1 else types}
    if not {"integer", "number"}.isdisjoint(types):
        bounds = {"minimum": field.bounds.min, "exclusiveMinimum": field.bounds.above}
        bounds |= {"maximum": field.bounds.max, "exclusiveMaximum": field.bounds.below}
        schema |= {name: bound for name, bound in bounds.items() if bound is not None}
    return schema


@functools.cache
def fields_of(kind: type) -> dict[str, Field]:
    """What may be given for each field of a dataclass."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        field.name: Field.of(field.name, hints[field.name], field.metadata.get("choices", ()))
        for field in fields(kind)
        if field.init
    }


def check_fields(config: Any, besides: type | None = None) -> None:
    """Raises UserError for the first field of a dataclass whose value cannot be.

    Those of `besides`, a class of others that it extends, are checked only where it declares them anew.
    """
    theirs = {} if besides is None else fields_of(besides)
    for name, field in fields_of(type(config)).items():
        if theirs.get(name) != field:
            field.check(getattr(config, name))


def missing_fields(kind: type, given: Iterable[str]) -> list[str]:
    """The fields that have no default and are not given."""
    needed = [field for field in fields(kind) if field.init and field.default is field.default_factory is MISSING]
    return [field.name for field in needed if field.name not in given]


def no_choice(name: str, value: Any, choices: Iterable[Any]) -> str:
    """What to say of a value that is none of the choices, with the nearest of them."""
    known = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if len(known) <= _SHOWN_CHOICES:
        return f"{name} is {shown(value)}; choose one of {', '.join(known)}.{hint}"
    key = name.rpartition(".")[2].partition("[")[0]
    listed = f"its {len(known)} choices (--help_keys {key} lists them)"
    return f"{name} is {shown(value)}, which is not one of {listed}.{hint}"


def shown(value: Any) -> str:
    """A value as an error shows it, in one line."""
    text = repr(value)
    return text if len(text) <= _SHOWN_LETTERS else f"{text[:_SHOWN_LETTERS]}..."


def _plain(member: Any) -> Any:
    origin = get_origin(member)
    if origin is Literal:
        return member
    if origin is tuple:
        return list
    return dict if origin is not None and issubclass(origin, Mapping) else origin or member


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))


def _is_of(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if get_origin(kind) is Literal:
        return any(value is choice or value == choice for choice in get_args(kind))
    # True is a whole number to Python.
    if isinstance(value, bool):
        return kind is bool
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real)
    if kind is str:
        return isinstance(value, str | os.PathLike)
    if kind in (dict, Mapping):
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if kind is list:
        return isinstance(value, list | tuple)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return isinstance(value, kind) or any(value == choice.value for choice in kind)
    return not isinstance(kind, type) or isinstance(value, kind)
