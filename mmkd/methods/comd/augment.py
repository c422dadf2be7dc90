"""Augmentors: new instructions made of old ones, and which of them are fit to join the pool."""

import random
import re
import string
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from mmkd.data.load_data import mixture_counts
from mmkd.errors import UserError
from mmkd.generation.generator import Sampling

from .assess import asked_about
from .comd_prompts import Prompts
from .comd_trainer import CoMDConfig
from .instructions import ImageStore, Instruction
from .reply_record import Advance, Engine, Record
from .similar import SimilarImages
from .text import nearest

AUGMENTORS = ("model", "templates", "random", "none")

NEIGHBOURS = 8
"""Pictures among which one is drawn for new_image: similar."""

_TIMES = 1000
"""Larger than how often a parent is asked for in one attempt."""

_LABEL = re.compile(
    r"^[#*\s]*(the |a )?(new |rewritten )?(instruction|question|prompt)\b[^:\n]{0,20}:[*\s]*", re.IGNORECASE
)


@dataclass(frozen=True)
class Candidate:
    """A new instruction, or why there is none."""

    instruction: Instruction | None
    reason: str = ""


class Augmentor(ABC):
    """Makes a candidate of each parent, in their order."""

    @abstractmethod
    def make(
        self, parents: Sequence[Instruction], kind: str, attempt: int, phase: str, advance: Advance
    ) -> list[Candidate]:
        """`kind` is hard, easy or any; another `attempt` of one round gives another child of the same parent."""


class ModelAugmentor(Augmentor):
    """A language model that is shown the parent, and its picture, and writes one instruction.

    `pick` chooses the pictures of a child; by default it keeps the parent's.
    """

    def __init__(
        self,
        record: Record,
        engine: Engine,
        prompts: Prompts,
        sampling: Sampling,
        store: ImageStore,
        pick: Callable[[Instruction, int], Sequence[str]],
    ):
        self.record, self.engine, self.prompts, self.sampling = record, engine, prompts, sampling
        self.store, self.pick = store, pick

    def make(
        self, parents: Sequence[Instruction], kind: str, attempt: int, phase: str, advance: Advance
    ) -> list[Candidate]:
        name = "augment_easy" if kind == "easy" else "augment_hard"
        questions, times = [], Counter[str]()
        for parent in parents:
            text = self.prompts.fill(name, instruction=parent.text)
            # A parent may stand in the list several times.
            questions.append(asked_about(parent, text, sample=_TIMES * attempt + times[parent.key]))
            times[parent.key] += 1
        replies = self.record.ask(self.engine, questions, self.sampling, phase, advance)
        candidates = []
        for parent, reply in zip(parents, replies, strict=True):
            text = cleaned(reply.text)
            if reply.finish_reason != "stop" or not text:
                candidates.append(
                    Candidate(None, "cut off" if reply.finish_reason == "length" else "empty or refused")
                )
            else:
                candidates.append(Candidate(self.store.reworded(parent, text, self.pick(parent, attempt), kind=kind)))
        return candidates


class TemplateAugmentor(Augmentor):
    """Questions of the pool asked about other pictures of the pool; no model writes anything.

    A hard parent's child asks a question of the parent's type (its first words) about a picture that looks like the
    parent's; an easy one's asks a question of a type that is rarer in the pool. For data whose questions follow
    templates. Raises UserError for a pool without pictures, where every question is asked already.
    """

    def __init__(
        self,
        pool: Sequence[Instruction],
        store: ImageStore,
        pick: Callable[[Instruction, int], Sequence[str]],
        type_words: int,
        seed: int,
    ):
        _require_images(pool, "templates")
        self.store, self.pick, self.type_words, self.seed = store, pick, type_words, seed
        self.questions: dict[str, list[str]] = {}
        self.counts: Counter[str] = Counter(instruction.type_of(type_words) for instruction in pool)
        for instruction in pool:
            texts = self.questions.setdefault(instruction.type_of(type_words), [])
            if instruction.text not in texts:
                texts.append(instruction.text)

    def make(
        self, parents: Sequence[Instruction], kind: str, attempt: int, phase: str, advance: Advance
    ) -> list[Candidate]:
        candidates = []
        for place, parent in enumerate(parents):
            draw = random.Random(f"{self.seed} {phase} {kind} {attempt} {place} {parent.key}")
            type_ = parent.type_of(self.type_words)
            if kind == "easy":
                rarer = [name for name, count in self.counts.items() if count <= self.counts[type_]]
                type_ = draw.choice(sorted(rarer))
            text = draw.choice(self.questions[type_])
            candidates.append(
                Candidate(self.store.reworded(parent, text, self.pick(parent, draw.randrange(2**30)), kind=kind))
            )
        advance(len(parents), 0)
        return candidates


class RandomAugmentor(Augmentor):
    """Any question of the pool about any picture of the pool, whatever the parent: the control."""

    def __init__(self, pool: Sequence[Instruction], store: ImageStore, seed: int):
        _require_images(pool, "random")
        self.store, self.seed, self.pool = store, seed, [instruction for instruction in pool if instruction.images]

    def make(
        self, parents: Sequence[Instruction], kind: str, attempt: int, phase: str, advance: Advance
    ) -> list[Candidate]:
        candidates = []
        for place in range(len(parents)):
            draw = random.Random(f"{self.seed} {phase} {kind} {attempt} {place}")
            question, shown = draw.choice(self.pool), draw.choice(self.pool)
            if len(question.images) != len(shown.images):
                candidates.append(Candidate(None, "another number of pictures"))
            else:
                candidates.append(Candidate(self.store.reworded(question, question.text, shown.images, kind=kind)))
        advance(len(parents), 0)
        return candidates


@dataclass
class Filter:
    """What may join the pool. Nothing that is held out, nothing without form, nothing that is there already.

    Two instructions about different pictures are different, whatever they say; about one picture, or without any, a
    ROUGE-L above `max_rouge` is a repetition (Lion's bound is 0.7).
    """

    pool: Sequence[Instruction]
    held_out: Sequence[Instruction]
    max_rouge: float = 0.7
    min_words: int = 4
    max_words: int = 200
    reasons: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, training: CoMDConfig, pool: Sequence[Instruction], held_out: Sequence[Instruction]) -> "Filter":
        """The filter of a run's settings."""
        return cls(pool, held_out, training.max_rouge, training.min_words, training.max_words)

    def __post_init__(self) -> None:
        self._held_out_keys = {instruction.key for instruction in self.held_out}
        self._held_out: dict[tuple[str, ...], list[list[str]]] = {}
        self._known: dict[tuple[str, ...], list[list[str]]] = {}
        for instructions, target in ((self.held_out, self._held_out), (self.pool, self._known)):
            for instruction in instructions:
                target.setdefault(instruction.images, []).append(instruction.words)
        self._keys = {instruction.key for instruction in self.pool}

    def accept(self, candidate: Candidate) -> Instruction | None:
        """The candidate's instruction, which then counts as one of the pool; None, with the reason counted."""
        instruction = candidate.instruction
        reason = candidate.reason if instruction is None else self._reason(instruction)
        if instruction is None or reason:
            self.reasons[reason] += 1
            return None
        self._keys.add(instruction.key)
        self._known.setdefault(instruction.images, []).append(instruction.words)
        return instruction

    def _reason(self, instruction: Instruction) -> str:
        if instruction.key in self._held_out_keys:
            return "held out"
        if len(instruction.words) < self.min_words:
            return "too short"
        if len(instruction.words) > self.max_words:
            return "too long"
        if instruction.text[0] in string.punctuation:
            return "begins with punctuation"
        if "instruction" in instruction.words:
            # The augmentor speaks of its task and does not do it.
            return "speaks of an instruction"
        if (
            instruction.key in self._keys
            or nearest(instruction.words, self._known.get(instruction.images, []), self.max_rouge) is not None
        ):
            return "repeats the pool"
        if nearest(instruction.words, self._held_out.get(instruction.images, []), self.max_rouge) is not None:
            return "like one that is held out"
        return ""


def picker(keep: bool, similar: SimilarImages | None, seed: int) -> Callable[[Instruction, int], Sequence[str]]:
    """Chooses the pictures of a child: the parent's, or for each of them one of those that look most like it."""

    def pick(parent: Instruction, attempt: int) -> Sequence[str]:
        if keep or similar is None:
            return parent.images
        draw = random.Random(f"{seed} {attempt} {parent.key}")
        return [draw.choice(similar.near(path, NEIGHBOURS) or [path]) for path in parent.images]

    return pick


def augment(
    augmentor: Augmentor,
    parents: dict[str, Sequence[Instruction]],
    counts: dict[str, int],
    fit: Filter,
    seed: int,
    phase: str,
    advance: Advance,
    tries: int = 3,
) -> dict[str, list[Instruction]]:
    """New instructions by the kind of their parents, at most as many as wanted of each.

    Parents are drawn without repetition as far as they go, `tries` times for what was rejected.
    """
    accepted: dict[str, list[Instruction]] = {kind: [] for kind in counts}
    for kind, count in counts.items():
        ordered = sorted(parents[kind], key=lambda instruction: instruction.key)
        for attempt in range(tries if ordered else 0):
            missing = count - len(accepted[kind])
            if missing <= 0:
                break
            draw = random.Random(f"{seed} {phase} {kind} {attempt}")
            chosen: list[Instruction] = []
            while len(chosen) < missing:
                chosen += draw.sample(ordered, min(len(ordered), missing - len(chosen)))
            made = augmentor.make(chosen, kind, attempt, phase, advance)
            accepted[kind] += [instruction for candidate in made if (instruction := fit.accept(candidate)) is not None]
    return accepted


def in_ratio(made: dict[str, list[Instruction]], hard_ratio: float, cap: int) -> list[Instruction]:
    """As many of each kind as keep the ratio of hard to easy, to within one: the scarcer side decides.

    A single kind, since there are no parents of another or their share is 0, is taken whole.
    """
    shares = {"hard": Fraction(str(hard_ratio)), "easy": 1 - Fraction(str(hard_ratio))}
    kinds = [kind for kind in made if shares.get(kind, 1) > 0]
    if len(kinds) == 1:
        return made[kinds[0]][:cap]
    sizes = mixture_counts([len(made[kind]) for kind in kinds], [shares[kind] for kind in kinds], cap)
    return [instruction for kind, size in zip(kinds, sizes, strict=True) for instruction in made[kind][:size]]


def cleaned(reply: str) -> str:
    """A reply without the label and the quotation marks that models put around an instruction."""
    text = _LABEL.sub("", reply.strip()).strip()
    if len(text) > 1 and (text[0], text[-1]) in (('"', '"'), ("'", "'"), ("“", "”")):
        text = text[1:-1].strip()
    return text


def _require_images(pool: Sequence[Instruction], kind: str) -> None:
    if not any(instruction.images for instruction in pool):
        raise UserError(
            f"augmentor: {kind} asks the pool's questions about other pictures of the pool, but there are no "
            "pictures. Use augmentor: model.",
            because="meaning",
        )
