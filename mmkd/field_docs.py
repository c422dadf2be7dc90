"""The docstring of a config, with its fields: made of what they declare, so that it says what is so."""

import dataclasses
import inspect
import textwrap
from itertools import islice
from typing import Any

from mmkd.schema import Field, Range

_WIDTH = 112
_MANY = 60
"""Characters of a default from which it is not shown."""


class DocumentedFields:
    """A dataclass whose docstring lists the fields that it and its bases of this kind declare.

    `help(KDConfig)` and a notebook's `KDConfig?` show it.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__doc__ = _docstring(cls)


def _docstring(config: type) -> str:
    """What the class says of itself, and a section `Args` as trl writes them."""
    ours = [base for base in config.__mro__ if issubclass(base, DocumentedFields) and base is not DocumentedFields]
    entries: dict[str, str] = {}
    for base in ours:
        # The newest class is no dataclass yet: its fields are still what stands in its body.
        declared = vars(base) | vars(base).get("__dataclass_fields__", {})
        for name, hint in base.__annotations__.items():
            field = declared.get(name)
            if isinstance(field, dataclasses.Field) and field.init and "help" in field.metadata:
                entries.setdefault(name, _entry(name, hint, field))
    others = (base for base in config.__mro__ if base not in ours and dataclasses.is_dataclass(base))
    rest = [
        f"Every argument of `{upstream.__name__}` ({upstream.__module__.partition('.')[0]}) may be given too."
        for upstream in islice(others, 1)
    ]
    about = inspect.cleandoc(vars(config).get("__doc__") or f"Settings of {config.__name__}.")
    return "\n".join([about, "", "Args:", *entries.values(), "", *rest])


def _entry(name: str, hint: Any, field: dataclasses.Field) -> str:
    holds = Field.of(name, hint, field.metadata.get("choices", ()))
    facts = [f"`{_type(hint)}`", *([f"one of {', '.join(map(str, holds.choices))}"] if holds.choices else [])]
    if holds.bounds != Range():
        facts.append(str(holds.bounds).removeprefix("a number "))
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if default is not None and default is not dataclasses.MISSING and len(repr(default)) < _MANY:
        facts.append(f"defaults to `{default!r}`")
    lines = textwrap.wrap(field.metadata["help"], _WIDTH - 8, break_on_hyphens=False)
    return "\n".join([f"    {name} ({', '.join(facts)}):", *(f"        {line}" for line in lines)])


def _type(hint: Any) -> str:
    """An annotation without its range."""
    kinds = [getattr(kind, "__name__", str(kind)) for kind in Field.of("", hint).kinds]
    return " | ".join("None" if kind == "NoneType" else kind for kind in kinds)
