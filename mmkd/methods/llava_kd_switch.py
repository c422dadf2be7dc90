"""llava_kd's switch: the student's visual output through the teacher's language model (Switch-KD, 2604.14629)."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from jaxtyping import Bool
from torch import Tensor

from mmkd.errors import UserError
from mmkd.losses.divergences import Divergence, forward_kl, reverse_kl
from mmkd.losses.fused import fused_loss
from mmkd.models.visual_switch import VisualOutputs, switched_to, trains_its_tower
from mmkd.nested_keys import nested_keys
from mmkd.teachers.batch import View
from mmkd.teachers.local import LocalTeacher, ModelTeacher
from mmkd.teachers.signals import DenseSignal
from mmkd.teachers.teacher import Teacher
from mmkd.training.logit_difference import DIFFERENCES, LogitDifferenceKeys

SWITCH, SWITCHED = "switch", "switched_token"
"""The term, and the kind of its items: the answer's tokens in rows with images."""

DIVERGENCES: dict[str, Callable[[LogitDifferenceKeys], Divergence]] = {
    **DIFFERENCES,
    "forward_kl": lambda config: forward_kl,
    "reverse_kl": lambda config: reverse_kl,
}


@dataclass(frozen=True)
class Switch:
    """How the switch counts. Raises UserError for a value that cannot be."""

    weight: float = 1.0
    divergence: str = "dbild"
    temperature: float = 3.0

    def __post_init__(self) -> None:
        for name in ("weight", "temperature"):
            value: Any = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise UserError(f"switch.{name} is {value!r}; give a number above 0.")
        if self.divergence not in DIVERGENCES:
            raise UserError(f"switch.divergence is {self.divergence!r}; choose one of {', '.join(DIVERGENCES)}.")

    @classmethod
    def of(cls, value: Any) -> Self | None:
        """The switch that a recipe, a command line (as JSON) or Python gives; None for None."""
        if value is None or isinstance(value, cls):
            return value
        names = [field.name for field in fields(cls)]
        return cls(**nested_keys("switch", value, names, '{"weight": 1.0}'))


def check_switch(args: Any) -> None:
    """Raises UserError for settings under which the switch teaches nothing, or cannot be computed."""
    if args.combine == "gradmag":
        raise UserError(
            "combine: gradmag compares gradients in the language model's last layer, and that of switch reaches the "
            "vision tower only. Set combine: weights, or remove switch.",
            because="meaning",
        )
    if args.torch_compile:
        raise UserError(
            "torch_compile leaves out the hooks that take the student's visual output, which switch needs. Set "
            "torch_compile: false, or remove switch.",
            because="upstream",
        )


def check_switching_teacher(teacher: Teacher[Any]) -> None:
    """Raises UserError for a teacher through whose weights no gradient can flow here."""
    if isinstance(teacher, LocalTeacher):
        return
    if not isinstance(teacher, ModelTeacher):
        raise UserError(
            f"switch sends the student's visual output through the teacher's language model and learns from the "
            f"gradient, and a {type(teacher).__name__} has no weights here. Load the teacher itself (teacher: MODEL "
            "without teacher_server and teacher_cache), or remove switch.",
            because="meaning",
        )
    raise UserError(
        "switch with teacher: self would run the student inside its own forward pass, which is not supported. Give "
        "the teacher as a model of its own, a copy of the student say, or remove switch.",
        because="not built",
    )


def check_switched_student(model: Any) -> None:
    """Raises UserError for a student whose vision tower is not trained: nothing else learns from the switch."""
    if not trains_its_tower(model):
        raise UserError(
            "switch teaches the vision tower, and nothing of the student's is trained there. Add vision_tower to "
            "trainable (or its layers to lora_target_modules), or remove switch from this stage.",
            because="meaning",
        )


def in_rows_with_images(view: View) -> Bool[Tensor, "token"]:
    """Which of the supervised tokens are in rows with images."""
    return torch.isin(view.supervised.nonzero()[:, 0], view.images[:, 0])


def switch_loss(
    args: Any, switch: Switch, teacher: LocalTeacher, view: View, answer: DenseSignal, outputs: VisualOutputs
) -> Tensor:
    """The sum over the answer's tokens in rows with images of how far the teacher moves from what it said itself.

    Its gradient reaches the student's vision tower alone: the teacher's connector and language model are frozen.
    """
    with switched_to(teacher.model, outputs):
        switched = teacher.differentiable(view, view.supervised)
    chosen = in_rows_with_images(view)
    labels = torch.zeros(int(chosen.sum()), dtype=torch.long, device=chosen.device)
    objective = DIVERGENCES[switch.divergence](args)
    return fused_loss(
        switched.hidden[chosen],
        switched.head,
        labels,
        DenseSignal(answer.hidden[chosen], answer.head),
        objective,
        temperature=switch.temperature,
        chunk_size=args.chunk_size,
        precise=args.precise_logits,
    ).total
