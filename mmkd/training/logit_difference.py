"""The divergences bild and dbild as settings: their keys, and what they read of a teacher."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

from mmkd.errors import UserError
from mmkd.field_docs import DocumentedFields
from mmkd.losses.divergences import Divergence
from mmkd.losses.logit_differences import bild, dbild
from mmkd.schema import Range
from mmkd.teachers.signals import ListedSignal, MixedSignal, SparseSignal
from mmkd.teachers.teacher import Teacher


@dataclass
class LogitDifferenceKeys(DocumentedFields):
    """How many tokens the divergences bild and dbild compare."""

    bild_top_k: Annotated[int, Range(min=2)] = field(
        default=8,
        metadata={
            "help": "For divergence: bild. How many of the teacher's most likely tokens are compared with each other, "
            "and again of the student's. 8 (default) as in the authors' code; time grows with its square."
        },
    )
    dbild_max_k: Annotated[int, Range(min=2)] = field(
        default=32,
        metadata={
            "help": "For divergence: dbild, which finds at each token how many of the most likely tokens to compare. "
            "This is the most that it takes. 32 (default) is ours; time grows with its square."
        },
    )


DIFFERENCES: dict[str, Callable[[LogitDifferenceKeys], Divergence]] = {
    "bild": lambda config: partial(bild, top_k=config.bild_top_k),
    "dbild": lambda config: partial(dbild, max_k=config.dbild_max_k),
}


def listed_tokens(signal: Any) -> MixedSignal[Any]:
    """What teachers say, without the rest as one outcome where they list tokens: it has no place in a difference."""
    return MixedSignal.of(signal).map(lambda said: ListedSignal(said) if isinstance(said, SparseSignal) else said)


def check_temperature(teacher: Teacher[Any], args: Any) -> None:
    """Raises UserError where the teacher's probabilities are not known at the temperature that is asked for.

    The tail has no place in differences between logits, which are known at any temperature.
    """
    if args.temperature == 1 or teacher.can_temper or args.divergence in DIFFERENCES:
        return
    otherwise = (
        "serve the teacher's hidden states (scripts/serve_teacher.sh MODEL --signal hidden)"
        if teacher.served
        else "teacher_tail: renormalise"
    )
    raise UserError(
        f"temperature is {args.temperature}, but this teacher is known at temperature 1 only: the shape of "
        f"its tail was not kept. Set temperature: 1, or {otherwise}.",
        because="meaning",
    )
