"""What a training is put together from, as data: axes, the cells of their product, and which of them are refused.

`tests/test_combinations.py` trains a covering array of the cells and provokes each refusal, so that the page made by
`scripts/combination_page.py` says what the code does.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from typing import Any, NamedTuple

from mmkd.errors import Because

AXES: dict[str, dict[str, str]] = {
    "method": {
        "kd": "`method: kd`",
        "taid": "`method: taid`",
        "alm": "`method: alm`, with a teacher that has another tokenizer",
        "llava_kd": "`method: llava_kd`",
        "sft": "`method: sft`, the baseline; its teacher measures and does not teach",
    },
    "teacher": {
        "local": "`teacher`: a model in the training process",
        "top-k cache": "`teacher_cache`, built with `cache_signal: top_k` (for `alm`: `log_probs`)",
        "hidden-state cache": "`teacher_cache`, built with `cache_signal: hidden`",
        "top-k server": "`teacher_server`, which tells the most likely tokens",
        "hidden-state server": "`teacher_server` with `teacher_server_signal: hidden`, which tells hidden states",
        "several, mixed": "`teachers`, weighed by `weight`",
        "several, routed": "`teachers`, chosen for each row by `teacher_column`",
        "self": "`teacher: self`, the student itself, in the form that `self_teacher` names",
    },
    "data": {"text": "rows of text", "images": "rows with images"},
    "student": {
        "full": "all weights are trained",
        "LoRA": "`use_peft: true`",
        "QLoRA": "`use_peft: true` and `load_in_4bit: true`",
    },
    "answers": {
        "off-policy": "the answers of the data",
        "on-policy": "`on_policy_fraction` above 0: answers of the student",
        "on-policy served": "`on_policy_fraction` above 0 and `rollout_server`: a server generates the answers",
        "packed": "`packing: true`",
        "packed on-policy": "`packing: true` and `on_policy_fraction` above 0",
    },
    "ranks": {
        "1 rank": "one process",
        "DDP": "`accelerate_config: ddp`",
        "FSDP2": "`accelerate_config: fsdp2`",
        "ZeRO-3": "`accelerate_config: zero3`",
    },
}
"""Axis -> its values, the plainest first, and how a recipe says them."""

Pair = tuple[tuple[str, str], tuple[str, str]]
"""Values of two axes, as (axis, value)."""


OWN_COPY = "taught by a copy of itself"
"""Beside a cell whose teacher is a second copy of the student, as what one that teaches itself is compared with."""


class Cell(NamedTuple):
    """One training: a value of each axis, and one of FURTHER besides."""

    method: str = "kd"
    teacher: str = "local"
    data: str = "text"
    student: str = "full"
    answers: str = "off-policy"
    ranks: str = "1 rank"
    besides: str = ""

    def __str__(self) -> str:
        return ", ".join(filter(None, self))

    @property
    def reference(self) -> "Cell":
        """The same training with a local teacher on one rank."""
        # What a server generates is what the student would. A server does not quantise the model that it has, and
        # says other things.
        here = self.answers == "on-policy served" and self.student != "QLoRA"
        answers = {"answers": "on-policy"} if here else {}
        if self.teacher == "self" and self.student == "QLoRA":
            # On a CPU bitsandbytes computes a frozen copy with other kernels than a student that is trained.
            return self._replace(ranks="1 rank", **answers)
        own = {"besides": OWN_COPY} if self.teacher == "self" else {}
        return self._replace(teacher="local", ranks="1 rank", **answers, **own)


@dataclass(frozen=True)
class Refusal:
    """Cells that are refused, and why."""

    where: Mapping[str, tuple[str, ...]]
    """Axis -> the values that it takes; any value of an axis that is not named."""
    because: Because
    reason: str
    """What a reader of the docs is told."""
    message: str | None
    """What the error says, as a regular expression; None where no key asks for such a training."""

    def __contains__(self, cell: object) -> bool:
        return all(getattr(cell, axis) in values for axis, values in self.where.items())

    @property
    def example(self) -> Cell:
        """A refused cell, refused by nothing else where there is such a cell, with the plainest values."""
        besides = self.where.get("besides", ("",))
        own = [cell for name in besides for cell in everything(name) if cell in self]
        return min(own, key=lambda cell: sum(cell in other for other in REFUSALS))


_ON_POLICY = ("on-policy", "on-policy served", "packed on-policy")
_CACHES = ("top-k cache", "hidden-state cache")

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        {"teacher": _CACHES, "answers": _ON_POLICY},
        "meaning",
        "A cache holds what the teacher says about the data's answers. What the student will say is not known before.",
        "teacher_cache holds the teacher's words about the data's answers",
    ),
    Refusal(
        {"method": ("sft",), "answers": _ON_POLICY},
        "meaning",
        "Trained on its own answers alone, without a teacher, a student learns what it does anyway.",
        "learns from the data's answers only",
    ),
    Refusal(
        {"data": ("images",), "answers": ("packed", "packed on-policy")},
        "not built",
        "Rows with images cannot be laid end to end.",
        "Rows with images cannot be laid end to end",
    ),
    Refusal(
        {"method": ("llava_kd",), "teacher": ("top-k cache", "top-k server")},
        "meaning",
        "A top-k has no hidden states, by which visual tokens are related. `beta: 0` and `gamma: 0` leave them out.",
        "gamma relates visual tokens by the teacher's hidden states",
    ),
    Refusal(
        {"method": ("alm",), "teacher": ("top-k server",), "besides": ("merged chunks",)},
        "upstream",
        "A server of log-probs does not tell how probable the end of a word is.",
        "chunks: merge needs more of the teacher than its most likely tokens",
    ),
    Refusal(
        {"teacher": ("top-k cache", "top-k server"), "besides": ("features of the last hidden state",)},
        "meaning",
        "A list of likely tokens tells nothing of what is inside the teacher.",
        "compares the teacher's last hidden state, and this teacher is",
    ),
    Refusal(
        {"teacher": ("hidden-state cache", "hidden-state server"), "besides": ("features of blocks",)},
        "meaning",
        "Only the last hidden state is kept or served, `student: last_hidden`.",
        "a module of the teacher, and this teacher is",
    ),
    Refusal(
        {"teacher": ("self",), "student": ("full",), "ranks": ("ZeRO-3",)},
        "not built",
        "Copies of weights that ZeRO-3 has cut are not kept. An adapter, or `self_teacher: live`, needs none.",
        "ZeRO-3 has cut",
    ),
    Refusal(
        {"student": ("QLoRA",), "besides": ("quantised student",)},
        "meaning",
        "The base is rounded when it is loaded, and `student_quantization` rounds it while it is trained.",
        "round the weights when they are loaded",
    ),
    Refusal(
        {"student": ("LoRA",), "ranks": ("ZeRO-3",), "besides": ("quantised student",)},
        "upstream",
        "What is rounded is the weight with its adapter, and ZeRO-3 gathers those of one layer.",
        "ZeRO-3 gathers those of one layer",
    ),
)


INEXACT: tuple[tuple[Mapping[str, tuple[str, ...]], str], ...] = (
    (
        {"teacher": ("hidden-state server",), "data": ("images",), "answers": _ON_POLICY},
        "A server of hidden states reads an answer to an image as text. What it reads as other tokens than the "
        "student wrote is left out of the loss and counted as `rollouts_retokenised`.",
    ),
)
"""Cells that train, but not on all that the same training with a local teacher learns from, and why."""


def is_exact(cell: Cell) -> bool:
    """Whether a cell that trains gives the losses of its reference."""
    return not any(all(getattr(cell, axis) in values for axis, values in where.items()) for where, _ in INEXACT)


@dataclass(frozen=True)
class Further:
    """Settings besides the axes."""

    description: str
    """How a recipe says them."""
    keys: Mapping[str, Any]
    cells: tuple[Cell, ...]
    """What they are trained with."""


FURTHER: dict[str, Further] = {
    "merged chunks": Further(
        "`chunks: merge`, the default of `alm`",
        {"chunks": "merge"},
        (
            Cell("alm", teacher="hidden-state server"),
            Cell("alm", teacher="top-k cache", answers="packed"),
            Cell("alm", data="images", ranks="FSDP2"),
        ),
    ),
    "answers alone": Further(
        "`beta: 0` and `gamma: 0`, which leave visual tokens out of `llava_kd`",
        {"beta": 0, "gamma": 0},
        (Cell("llava_kd", teacher="top-k server", data="images"), Cell("llava_kd", teacher="top-k cache")),
    ),
    "gradmag": Further(
        "`combine: gradmag`",
        {"combine": "gradmag", "ce_weight": 0.3},
        (Cell(teacher="hidden-state server"), Cell(ranks="FSDP2"), Cell(student="LoRA", ranks="ZeRO-3")),
    ),
    "gradmag of visual terms": Further(
        "`combine: gradmag`", {"combine": "gradmag"}, (Cell("llava_kd", data="images", ranks="FSDP2"),)
    ),
    "evaluation before training": Further(
        "`eval_on_start: true`",
        {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2},
        (
            Cell(teacher="hidden-state server"),
            Cell(ranks="FSDP2"),
            Cell("alm", student="LoRA", ranks="ZeRO-3"),
            Cell("llava_kd", data="images", ranks="FSDP2"),
        ),
    ),
    "both answers": Further(
        "`divergence: contrastive` and `rollout_rows: add`: the data's answers and the student's in one step",
        {"divergence": "contrastive", "rollout_rows": "add"},
        (Cell(answers="packed on-policy"), Cell(answers="on-policy", ranks="FSDP2")),
    ),
    "cross-entropy": Further(
        "`ce_weight` beside answers of the student: cross-entropy of the data's answers",
        {"ce_weight": 0.3},
        (
            Cell(answers="on-policy"),
            Cell("taid", answers="packed on-policy", ranks="DDP"),
            Cell("alm", answers="on-policy"),
            Cell(teacher="several, mixed", answers="on-policy", ranks="FSDP2"),
        ),
    ),
    "features of blocks": Further(
        "`features` of hidden states inside the models",
        {"features": [{"student": "every_2nd", "weight": 0.5}, {"student": "every_2nd", "kind": "relation"}]},
        (
            Cell(answers="on-policy"),
            Cell("taid", answers="packed", ranks="DDP"),
            Cell(ranks="FSDP2"),
            Cell(student="LoRA", ranks="ZeRO-3"),
            Cell("llava_kd", data="images", student="LoRA"),
        ),
    ),
    "features of the last hidden state": Further(
        "`features` of the last hidden state",
        {"features": [{"student": "last_hidden", "weight": 0.5}, {"student": "last_hidden", "kind": "relation"}]},
        (
            Cell(teacher="hidden-state cache", answers="packed"),
            Cell(teacher="hidden-state server", answers="on-policy"),
            Cell("taid", teacher="hidden-state cache", ranks="DDP"),
            Cell("llava_kd", teacher="hidden-state cache", data="images", ranks="FSDP2"),
        ),
    ),
    "switch": Further(
        "`switch`, with a vision tower that is trained",
        {"switch": {"weight": 0.5}, "trainable": ["vision_tower", "connector", "language_model"]},
        (
            Cell("llava_kd", data="images", ranks="DDP"),
            Cell("llava_kd", data="images", ranks="FSDP2"),
        ),
    ),
    "new student": Further(
        "`student_init: prune`, with an adapter on the student that is made",
        {"student_init": "prune", "student_layers": 1},
        (Cell(student="LoRA"), Cell("alm", student="LoRA", ranks="FSDP2"), Cell(student="QLoRA")),
    ),
    "quantised student": Further(
        "`student_quantization`",
        {"student_quantization": "int4"},
        (
            Cell(answers="on-policy"),
            Cell("taid", student="LoRA", answers="packed"),
            Cell("alm", student="LoRA", ranks="FSDP2"),
            Cell("llava_kd", data="images", ranks="FSDP2"),
            Cell(ranks="ZeRO-3"),
        ),
    ),
}
"""Name -> settings that are not combined with everything."""


def further_cells() -> list[Cell]:
    """The cells of FURTHER."""
    return [cell._replace(besides=name) for name, further in FURTHER.items() for cell in further.cells]


@cache
def everything(besides: str = "") -> tuple[Cell, ...]:
    """All cells of the product, with one of FURTHER besides."""
    return tuple(Cell(*values)._replace(besides=besides) for values in product(*AXES.values()))


def refusals_of(cell: Cell) -> list[Refusal]:
    """Why a cell is refused; empty for one that trains."""
    return [refusal for refusal in REFUSALS if cell in refusal]


@cache
def pairs() -> dict[Pair, tuple[Refusal, ...]]:
    """Each pair of values -> the refusals that leave no cell with it; empty where such cells train."""
    result: dict[Pair, tuple[Refusal, ...]] = {}
    for first, second in combinations(AXES, 2):
        for ours, theirs in product(AXES[first], AXES[second]):
            cells = [cell for cell in everything() if (getattr(cell, first), getattr(cell, second)) == (ours, theirs)]
            reasons = () if any(not refusals_of(cell) for cell in cells) else _reasons(cells)
            result[(first, ours), (second, theirs)] = reasons
    return result


def _reasons(cells: list[Cell]) -> tuple[Refusal, ...]:
    """The refusals that all cells have in common, or all that any of them has."""
    of_all = [refusal for refusal in REFUSALS if all(cell in refusal for cell in cells)]
    return tuple(of_all or [refusal for refusal in REFUSALS if any(cell in refusal for cell in cells)])


@cache
def covering() -> tuple[Cell, ...]:
    """Cells that train and have, together, every pair of values that any such cell has; the same ones each time.

    Greedy: each has as many pairs as can be that those before it have not, the first of those with as many.
    """
    numbers = {pair: number for number, pair in enumerate(pairs())}
    masks = {cell: _mask(cell, numbers) for cell in everything() if not refusals_of(cell)}
    missing = 0
    for mask in masks.values():
        missing |= mask
    chosen = []
    while missing:
        cell = max(masks, key=lambda cell: (masks[cell] & missing).bit_count())
        missing &= ~masks[cell]
        chosen.append(cell)
    return tuple(chosen)


def _mask(cell: Cell, numbers: Mapping[Pair, int]) -> int:
    return sum(1 << numbers[pair] for pair in pairs_of(cell))


def pairs_of(cell: Cell) -> Iterator[Pair]:
    """The pairs of (axis, value) of a cell."""
    yield from combinations([(axis, getattr(cell, axis)) for axis in AXES], 2)
