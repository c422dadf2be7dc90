"""The terms of `features` as modules of a student and of its teachers, found and checked before training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mmkd.errors import UserError
from mmkd.models.backbone import base_of
from mmkd.models.captured_features import HIDDEN_STATES, INPUT, blocks_of, modules_of, named_modules_of
from mmkd.models.parts import part_of
from mmkd.seams.transformers_seam import attention_of
from mmkd.teachers.cached import CachedTeacher
from mmkd.teachers.local import ModelTeacher
from mmkd.teachers.several import named_parts
from mmkd.teachers.teacher import DenseTeacher

from .feature_terms import LAST_HIDDEN, FeatureTerm

STATES = ""
"""In the place of a module's name: the hidden states with which a teacher that is not here answers."""


@dataclass(frozen=True)
class FeaturePair:
    """A module of the student and what it is compared with, one of those that a term stands for."""

    name: str
    """In the logs, after `feature_`."""
    term: FeatureTerm
    weight: float
    student: str
    teachers: Mapping[str, str]
    """Teacher -> its module, of the teachers that the term speaks of."""
    tokens: str
    by_image: bool
    """Whether the student's module computes features of images, and not of positions in the text."""

    @property
    def report(self) -> str:
        """Its name in the logs, and of its items."""
        return f"feature_{self.name}"

    @property
    def counts_tokens(self) -> bool:
        """Whether its items are tokens, and not images or sequences."""
        return self.tokens != "visual" and self.term.kind != "relation"


def is_of_images(module: str) -> bool:
    """Whether a module computes features of images, by its name, and not of positions in the text."""
    return part_of(module.removesuffix(INPUT)) != "language_model"


def pairs_of_terms(
    terms: Sequence[FeatureTerm], student: nn.Module, teacher: Any, vision: bool, alike: bool
) -> list[FeaturePair]:
    """The pairs of modules that terms stand for. `vision`: rows have images; `alike`: all read what the student reads.

    Raises UserError for modules that there are not, and for terms that cannot be of these models and rows.
    """
    pairs: list[FeaturePair] = []
    taken: set[str] = set()
    for term in terms:
        ours = _modules(student, term.student)
        theirs = {name: _modules_of_teacher(term, name, part, student, ours) for name, part in _parts(term, teacher)}
        if not theirs:
            raise UserError(
                f"features: {term.label} names the teachers {', '.join(term.teacher or ())}, and the run has "
                f"{', '.join(map(repr, named_parts(teacher)))}."
            )
        for number, module in enumerate(ours):
            label = term.label if len(ours) == 1 else f"{term.label}_{_place(module, number)}"
            name, again = label, 2
            while name in taken:
                name, again = f"{label}_{again}", again + 1
            taken.add(name)
            tokens = term.tokens or ("visual" if term.is_visual or is_of_images(module) else "answer")
            modules = {teacher: parts[number] for teacher, parts in theirs.items()}
            pair = FeaturePair(name, term, term.weight / len(ours), module, modules, tokens, is_of_images(module))
            _check(pair, student, teacher, vision, alike)
            pairs.append(pair)
    return pairs


def _parts(term: FeatureTerm, teacher: Any) -> list[tuple[str, Any]]:
    """The teachers that a term speaks of, by name. Raises UserError for a name that none has."""
    parts = named_parts(teacher)
    if isinstance(term.teacher, Mapping):
        unknown = [name for name in term.teacher if name not in parts]
        if unknown:
            raise UserError(
                f"features: {term.label} names the teacher {unknown[0]!r}, and the run has "
                f"{', '.join(map(repr, parts)) if parts.keys() != {''} else 'one teacher without a name'}. Name a "
                "module of the teacher, or, of several teachers, teacher: {NAME: MODULE}."
            )
    return [(name, part) for name, part in parts.items() if term.of_teacher(name) is not None]


def _modules(model: nn.Module, name: str) -> list[str]:
    if name != LAST_HIDDEN:
        return modules_of(model, name)
    decoder = base_of(model).get_decoder()  # pyright: ignore[reportArgumentType]
    return [module for module, own in named_modules_of(model).items() if own is decoder]


def _modules_of_teacher(term: FeatureTerm, name: str, teacher: Any, student: nn.Module, ours: list[str]) -> list[str]:
    """The modules of one teacher, one for each of the student's."""
    called = term.of_teacher(name)
    assert called is not None
    if not isinstance(teacher, ModelTeacher):
        _check_states(term, called, teacher)
        return [STATES]
    if called.startswith("every_") and called == term.student:
        # By their place in the depth: the numbers of blocks may differ.
        own = blocks_of(student)
        return _spread([own.index(module) + 1 for module in ours], len(own), blocks_of(teacher.model))
    if called == HIDDEN_STATES == term.student:
        embeddings, *blocks = modules_of(teacher.model, called)
        return [embeddings, *_spread(range(1, len(ours)), len(ours) - 1, blocks)]
    theirs = _modules(teacher.model, called)
    if len(theirs) == len(ours):
        return theirs
    if len(ours) == 1 or len(theirs) == 1:
        raise UserError(
            f"features: {term.student} stands for {len(ours)} modules of the student and {called} for {len(theirs)} "
            "of the teacher. Name as many of both, each pair as a term of its own.",
            because="meaning",
        )
    return _spread(list(range(1, len(ours) + 1)), len(ours), theirs)


def _spread(places: Sequence[int], depth: int, modules: Sequence[str]) -> list[str]:
    """The modules at the same relative depth as these places, counted from 1, in a depth."""
    return [modules[max(1, round(place * len(modules) / depth)) - 1] for place in places]


def _place(module: str, otherwise: int) -> int | str:
    """What tells a module from the others of its term, in the logs."""
    if module.endswith(INPUT):
        return "embeddings"
    numbers = [word for word in module.split(".") if word.isdigit()]
    return int(numbers[-1]) if numbers else otherwise


def _check_states(term: FeatureTerm, called: str, teacher: Any) -> None:
    """Raises UserError where a teacher that is not here tells nothing that the term compares."""
    cached = isinstance(teacher, CachedTeacher)
    what = "a cache" if cached else "a server"
    if called != LAST_HIDDEN:
        raise UserError(
            f"features: {term.label} compares {called}, a module of the teacher, and this teacher is {what}. Load the "
            f"teacher itself, or compare {LAST_HIDDEN} with hidden states (teacher_server_signal: hidden, or a cache "
            "built with cache_signal: hidden).",
            because="meaning",
        )
    if not isinstance(teacher, DenseTeacher) and not (cached and teacher.states is not None):
        raise UserError(
            f"features: {term.label} compares the teacher's last hidden state, and this teacher is {what} of "
            "log-probs. Use teacher_server_signal: hidden, or a cache built with cache_signal: hidden, or load the "
            "teacher itself.",
            because="meaning",
        )
    if term.of_attention or term.tokens in ("all", "visual"):
        raise UserError(
            f"features: {term.label} compares more than the answer, of which {what} tells nothing. Set tokens: "
            "answer and kind: cosine, mse or relation, or load the teacher itself.",
            because="meaning",
        )


def _check(pair: FeaturePair, student: nn.Module, teacher: Any, vision: bool, alike: bool) -> None:
    """Raises UserError for a pair that cannot be of these models and rows."""
    place, parts = f"features: {pair.name}", named_parts(teacher)
    if pair.tokens == "visual" and not vision:
        raise UserError(
            f"{place} is about images, and the rows are text. Remove the term, set tokens: answer, or use data with "
            "images.",
            because="meaning",
        )
    for name, module in pair.teachers.items():
        if module != STATES and is_of_images(module) != pair.by_image:
            raise UserError(
                f"{place} compares {pair.student} of the student with {module} of the teacher, and only one of them "
                "computes features of images. Name two modules of the language models, or two of the towers.",
                because="meaning",
            )
        if pair.term.of_attention and isinstance(parts[name], ModelTeacher):
            _check_eager(parts[name].model, module, place, "teacher_attn_implementation")
    if pair.by_image and pair.tokens != "visual":
        raise UserError(
            f"{place} has tokens: {pair.tokens}, and {pair.student} computes features of images. Set tokens: visual.",
            because="meaning",
        )
    if not alike and pair.tokens == "all":
        raise UserError(
            f"{place} compares all tokens, and with teacher_view the teacher reads another prompt. Set tokens: "
            "answer.",
            because="meaning",
        )
    if not alike and pair.term.of_attention:
        raise UserError(
            f"{place} compares what tokens attend to, and with teacher_view the teacher reads another prompt. Set "
            "another kind.",
            because="meaning",
        )
    if pair.term.of_attention:
        _check_eager(student, pair.student, place, "attn_implementation")


def _check_eager(model: nn.Module, name: str, place: str, key: str) -> None:
    """Raises UserError where a module keeps no map of attention."""
    config: Any = getattr(named_modules_of(model)[name], "config", None)
    attention = None if config is None else attention_of(config)
    if attention is None:
        raise UserError(
            f"{place} compares maps of attention, and {name} is no module of attention. Name a module of "
            f"self-attention, such as layers.5.self_attn, and set {key}: eager.",
            because="meaning",
        )
    if attention != "eager":
        raise UserError(
            f"{place} compares maps of attention, and {name} computes attention by {attention}, without maps. Set "
            f"{key}: eager.",
            because="upstream",
        )
