"""Settings of method clip_kd about students that begin with a part of their teacher's weights."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from mmkd.errors import UserError
from mmkd.field_docs import DocumentedFields
from mmkd.models.inherit import TOWERS, TowerSize
from mmkd.nested_keys import nested_keys
from mmkd.schema import PositiveFloat, Range

_SIZES = ("layers", "width", "ffn")
_EXAMPLE = '{"vision": 0.5, "text": {"layers": 3, "width": 256}}'


@dataclass
class InheritConfig(DocumentedFields):
    """Settings of student_init: inherit."""

    inherit: str = field(
        default="manual",
        metadata={
            "help": "For student_init: inherit. Which weights are kept. manual (default): every n-th layer, and of "
            "every tensor the front. auto: what training finds least needed is taken out, by masks over channels, "
            "heads, neurons and layers; of CLIP and SigLIP. Either way the student is an ordinary model.",
            "choices": ["manual", "auto"],
        },
    )
    inherit_target: Any = field(
        default=None,
        metadata={
            "help": "For student_init: inherit. The share of the weights of the layers to keep, such as 0.5, or "
            f"one for each tower: {_EXAMPLE}. With inherit: manual a tower may name layers, width and ffn. "
            "Embeddings of tokens and patches shrink with the width and are not counted."
        },
    )
    inherit_ramp: Annotated[float, Range(above=0, max=1)] = field(
        default=0.35,
        metadata={"help": "For inherit: auto. The share of all steps in which the target is approached."},
    )
    inherit_freeze: Annotated[float, Range(above=0, max=1)] = field(
        default=0.6,
        metadata={
            "help": "For inherit: auto. The share of all steps after which the masks are decided; the rest of the "
            "training is of what is kept. Default: 0.6."
        },
    )
    inherit_learning_rate: PositiveFloat | None = field(
        default=None,
        metadata={
            "help": "For inherit: auto. Learning rate of the masks. Default: 0.02 as in TinyCLIP, more where there "
            "are fewer than 1,000 steps in inherit_ramp."
        },
    )

    def check_inherit(self) -> None:
        """Reads inherit_target, and raises UserError for one that is no size, and for steps in a wrong order."""
        if self.inherit_target is None:
            return
        self.inherit_target = _target(self.inherit_target)
        if self.inherit == "auto":
            named = [tower for tower, own in self.inherit_target.items() if not isinstance(own, float)]
            if named:
                raise UserError(
                    f"inherit: auto decides about layers, width and ffn itself; give the {named[0]} tower a share, "
                    "such as 0.5, or use inherit: manual.",
                    because="meaning",
                )
            if self.inherit_freeze < self.inherit_ramp:
                raise UserError(
                    f"inherit_freeze {self.inherit_freeze:g} is before the end of inherit_ramp {self.inherit_ramp:g}: "
                    "masks would be decided before they reach their target. Raise it.",
                    because="meaning",
                )

    @property
    def learns_masks(self) -> bool:
        """Whether the training itself finds out which weights stay."""
        return self.inherit == "auto" and self.inherit_target is not None

    @property
    def targets(self) -> dict[str, Any]:
        """Tower -> a share, or its sizes."""
        return dict(self.inherit_target)

    def sizes_within(self, whole: Mapping[str, TowerSize]) -> dict[str, TowerSize]:
        """The sizes of a student's towers. Raises UserError for some that its teacher cannot be cut to."""
        return {
            tower: size.share(own) if isinstance(own, float) else size.with_sizes(tower, own)
            for (tower, size), own in ((pair, self.targets[pair[0]]) for pair in whole.items())
        }


def _target(value: Any) -> dict[str, Any]:
    """Tower -> a share, or its sizes; a tower that is not named stays whole."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return dict.fromkeys(TOWERS, _share(value))
    towers = nested_keys("inherit_target", value, tuple(TOWERS), _EXAMPLE)
    return {tower: _tower(tower, towers.get(tower, 1.0)) for tower in TOWERS}


def _tower(tower: str, value: Any) -> float | dict[str, int]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _share(value)
    sizes = nested_keys(f"inherit_target.{tower}", value, _SIZES, '{"layers": 3, "width": 256}')
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise UserError(f"inherit_target.{tower}.{name} is {size!r}; it must be a whole number.")
    return sizes


def _share(value: float) -> float:
    if not 0 < value <= 1:
        raise UserError(f"inherit_target is {value:g}; as a share of the weights it must be above 0 and at most 1.")
    return float(value)
