"""One term of `features`: which modules of student and teacher are compared, on which items, and how."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Self

from mmkd.errors import UserError
from mmkd.models.captured_features import ATTENTIONS, HIDDEN_STATES, INPUT
from mmkd.nested_keys import nested_keys
from mmkd.schema import PositiveFloat, fields_of

KINDS = ("mse", "cosine", "relation", "attention", "attention_mse")
ITEMS = ("answer", "all", "visual")
PROJECTORS = ("linear", "none")
VISUAL_TOKENS = ("same", "pool", "hungarian")

LAST_HIDDEN = "last_hidden"
"""The module's name that means the last hidden state, which served teachers and caches may know too."""

_OF_ATTENTION = ("attention", "attention_mse")
_VISUAL = ("tower", "projector", "deepstack")
_EXAMPLE = "features: [{student: layers.5, teacher: layers.11, kind: mse}]"


@dataclass(frozen=True)
class FeatureTerm:
    """A distance between what a module of the student and one of the teacher compute, with its weight in the loss.

    Raises UserError for settings that have no meaning together.
    """

    student: str
    """A module's name, or a shorthand that stands for one module or several."""
    teacher: str | dict[str, str] | None = None
    """The teacher's; of several teachers by name those that have one. None: called as the student's."""
    kind: str = field(default="cosine", metadata={"choices": KINDS})
    weight: PositiveFloat = 1.0
    """Shared alike by the modules that a shorthand stands for."""
    projector: str | None = field(default=None, metadata={"choices": PROJECTORS})
    """None: linear where the two widths differ."""
    tokens: str | None = field(default=None, metadata={"choices": ITEMS})
    """None: visual of modules for images, else answer."""
    visual_tokens: str = field(default="same", metadata={"choices": VISUAL_TOKENS})
    """What is done where the two sides cut an image into different numbers of tokens."""
    name: str | None = None
    """In the logs."""

    def __post_init__(self) -> None:
        if self.kind in ("relation", *_OF_ATTENTION) and self.projector is not None:
            raise UserError(
                f"kind: {self.kind} compares no features themselves, whose widths may differ. Remove projector.",
                because="meaning",
            )
        if self.of_attention and self.tokens == "visual":
            raise UserError(
                f"kind: {self.kind} compares what text tokens attend to. Set tokens: answer or all, or choose kind: "
                "relation for visual tokens.",
                because="meaning",
            )
        without = (*_VISUAL, LAST_HIDDEN, HIDDEN_STATES)
        if self.of_attention and (self.student in without or self.student.endswith(INPUT)):
            raise UserError(
                f"kind: {self.kind} compares maps of attention, and {self.student} computes none. Name a module of "
                "self-attention, such as layers.5.self_attn, or attentions for all of them, or set another kind.",
                because="meaning",
            )
        if self.student == ATTENTIONS and not self.of_attention:
            raise UserError(
                f"{ATTENTIONS} are maps of attention, and kind: {self.kind} compares features. Set kind: attention or "
                "attention_mse.",
                because="meaning",
            )
        if self.visual_tokens == "hungarian" and self.kind == "relation":
            raise UserError(
                "visual_tokens: hungarian pairs tokens whose features are alike, and kind: relation compares features "
                "of any width, which need not be alike. Set visual_tokens: pool, or kind: cosine.",
                because="meaning",
            )
        if self.name is not None and not re.fullmatch(r"[\w.-]+", self.name):
            raise UserError(f"name is {self.name!r}; use letters, digits, dots, - and _ only.")

    @property
    def label(self) -> str:
        """What the term is called in the logs, after `feature_`."""
        if self.name is not None:
            return self.name
        words = self.student.removesuffix(INPUT).split(".")[-2:]
        return "_".join([*words, *(["input"] if self.student.endswith(INPUT) else [])])

    @property
    def of_attention(self) -> bool:
        """Whether maps of attention are compared, and not features."""
        return self.kind in _OF_ATTENTION

    @property
    def is_visual(self) -> bool:
        """Whether its shorthand speaks of modules for images."""
        return self.student in _VISUAL

    def of_teacher(self, name: str) -> str | None:
        """The module of the only teacher (without a name), or of one of several; None where it is not compared."""
        if isinstance(self.teacher, Mapping):
            return self.teacher.get(name)
        return self.student if self.teacher is None else self.teacher

    @classmethod
    def of(cls, value: Any, place: str = "features") -> Self:
        """The term that a mapping of its keys gives, or a module's name alone. `place` says in errors where it stands.

        Raises UserError for keys and values that no term has.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            value = {"student": value}
        names = [part.name for part in fields(cls)]
        value = nested_keys(place, value, names, _EXAMPLE)
        if "student" not in value:
            raise UserError(f"{place} names no module of the student. Set student, such as {_EXAMPLE}.")
        checked = fields_of(cls)
        given = {key: checked[key].read(own, f"{place}.") for key, own in value.items()}
        if isinstance(teacher := given.get("teacher"), Mapping):
            for name, module in teacher.items():
                if not isinstance(module, str):
                    raise UserError(f"{place}.teacher.{name} is {module!r:.60}; give the name of a module.")
            given["teacher"] = MappingProxyType(dict(teacher))
        try:
            return cls(**given)
        except UserError as error:
            raise UserError(f"{place}: {error}", because=error.because) from error


def terms_of(value: Any) -> tuple[FeatureTerm, ...]:
    """The terms that a recipe, a command line (as JSON) or Python gives: one of them, or a list.

    Terms with the same label get a number. Raises UserError for a value that is no term.
    """
    if value is None:
        return ()
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f'features is no JSON ({error}). Write it as \'[{{"student": "tower"}}]\'.') from error
    listed = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    places = ["features"] if len(listed) == 1 else [f"features[{number}]" for number in range(len(listed))]
    terms = [FeatureTerm.of(item, place) for item, place in zip(listed, places, strict=True)]
    named = [term.name for term in terms if term.name is not None]
    if twice := next((name for name in named if named.count(name) > 1), None):
        raise UserError(f"features has two terms with the name {twice!r}. Give each one of its own.")
    return tuple(terms)
