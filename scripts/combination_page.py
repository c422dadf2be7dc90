"""The page of the site about what can be combined, made from the cells that are tested and from refusals."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import get_args

from mmkd.errors import Because
from scripts.combination_axes import AXES, FURTHER, INEXACT, REFUSALS, Cell, Refusal, pairs
from scripts.combinations import refusals

_KINDS = {
    "meaning": "The combination has no meaning.",
    "upstream": "A library that mmkd uses forbids it.",
    "not built": "It could work, and nobody has built it yet.",
}
_TITLES = {
    "method": "Method",
    "teacher": "Teacher",
    "data": "Data",
    "student": "Student",
    "answers": "Answers",
    "ranks": "Processes",
}


def combination_page() -> str:
    """The page as Markdown."""
    lines = [
        "# What can be combined",
        "",
        "Methods, teachers, data, students and ways to spread a training over GPUs can be combined freely, apart from "
        "what this page lists. mmkd refuses such a recipe before training starts, and the error says what to change.",
        "",
        "`tests/test_combinations.py` trains tiny models in a selection of combinations that contains every *yes* of "
        "the tables below. Each must give the losses and gradient norms of the same training with a local teacher in "
        "one process. The same test provokes every refusal.",
        "",
        "There are three reasons for a refusal:",
        "",
        *(f"- **{kind}**: {_KINDS[kind]}" for kind in get_args(Because)),
        "",
        "## The choices",
        "",
        *_choices(),
        "## What is refused",
        "",
        "| no. | combination | reason | |",
        "|---|---|---|---|",
        *(_refused(number, refusal) for number, refusal in enumerate(REFUSALS, start=1)),
        "",
        "## What trains on less",
        "",
        *(f"- {_combination(where)}: {reason}" for where, reason in INEXACT),
        "",
        "## Two choices at a time",
        "",
        "*yes*: there is a training with both. *no*: there is none, for the reason of this number above.",
        "",
        *(line for first, second in combinations(AXES, 2) for line in _matrix(first, second)),
        "## Further settings",
        "",
        "These are trained in the combinations named here, with the same check.",
        "",
        "| setting | trained with |",
        "|---|---|",
        *(f"| {further.description} | {'; '.join(map(_differing, further.cells))} |" for further in FURTHER.values()),
        "",
        "## Methods `dho`, `tower_kd`, `clip_kd`, `trans_encoder` and `comd`",
        "",
        "A student of `dho` predicts classes, one of `tower_kd` features and one of `clip_kd` embeddings, so that the "
        "tables above are not about them. `tower_kd` and `clip_kd` learn from one or several local teachers, "
        "`clip_kd` also without one. `tower_kd` trains whole towers, in one process or with `accelerate_config: ddp` "
        "or `zero2`; `clip_kd` trains whole students and adapters, with `fsdp2` and `zero3` too. "
        "`trans_encoder` trains encoders of sentences in one process. `comd` is a series of trainings, and each of "
        "them is one of `round_method`, to which the tables apply. What these "
        "methods refuse is in the list of messages below.",
        "",
        "## All messages",
        "",
        "Every error of mmkd that refuses a combination of settings, with the first sentence of its message. `{...}` "
        "stands for what the recipe says.",
        "",
        *_messages(),
    ]
    return "\n".join(lines)


def _choices() -> Iterable[str]:
    yield from ("| | | in a recipe |", "|---|---|---|")
    for axis, values in AXES.items():
        for number, (value, description) in enumerate(values.items()):
            yield f"| {'' if number else f'**{_TITLES[axis]}**'} | {value} | {description} |"
    yield ""


def _refused(number: int, refusal: Refusal) -> str:
    return f"| {number} | {_combination(refusal.where)} | {refusal.because} | {refusal.reason} |"


def _differing(cell: Cell) -> str:
    """The values in which a cell differs from the plainest one, and its method."""
    others = zip(cell[1:], Cell()[1:], strict=True)
    return ", ".join([cell.method, *(value for value, plain in others if value != plain)])


def _combination(where: Mapping[str, tuple[str, ...]]) -> str:
    """What cells have in common, in words."""
    parts: dict[str, Sequence[str]]
    parts = {_TITLES[axis].lower(): values for axis, values in where.items() if axis != "besides"}
    parts |= {"besides": [FURTHER[name].description for name in where.get("besides", ())]}
    return "; ".join(f"{title}: {' or '.join(values)}" for title, values in parts.items() if values)


def _matrix(first: str, second: str) -> Iterable[str]:
    """A table of two axes, the one with more values down."""
    rows, columns = sorted((first, second), key=lambda axis: -len(AXES[axis]))
    yield from (f"### {_TITLES[rows]} and {_TITLES[columns].lower()}", "")
    yield from (f"| | {' | '.join(AXES[columns])} |", f"|---|{'---|' * len(AXES[columns])}")
    for row in AXES[rows]:
        values = [(row, column) if rows == first else (column, row) for column in AXES[columns]]
        cells = [_verdict(pairs()[(first, ours), (second, theirs)]) for ours, theirs in values]
        yield f"| **{row}** | {' | '.join(cells)} |"
    yield ""


def _verdict(reasons: tuple[Refusal, ...]) -> str:
    if not reasons:
        return "yes"
    return f"no ({', '.join(str(REFUSALS.index(refusal) + 1) for refusal in reasons)})"


def _messages() -> Iterable[str]:
    for kind in get_args(Because):
        sentences = sorted({refusal.sentence for refusal in refusals() if refusal.because == kind})
        yield from (f"### Reason: {kind}", "", *(f"- {_plain(sentence)}" for sentence in sentences), "")


def _plain(sentence: str) -> str:
    """A message as Markdown that means nothing but its letters."""
    return "".join(f"\\{letter}" if letter in "\\`*_<>[]|#" else letter for letter in sentence)


if __name__ == "__main__":
    print(combination_page())
