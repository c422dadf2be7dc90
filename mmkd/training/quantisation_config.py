"""What a recipe says of a student that is trained as it will be quantised."""

from copy import copy
from dataclasses import dataclass, field
from typing import Annotated, Self

from mmkd.errors import UserError
from mmkd.models.quantisation_grids import FORMATS
from mmkd.models.quantised_students import StudentQuantisation
from mmkd.schema import Range

from .rollout_config import RolloutConfig


@dataclass
class QuantisationConfig(RolloutConfig):
    """The keys of student_quantization."""

    student_quantization: str | None = field(
        default=None,
        metadata={
            "help": "Train the student as it will be deployed: its linear layers compute with weights rounded to this "
            "format, and the gradient goes straight to the weights themselves, which stay in full precision and are "
            "what is saved. int4 and mxfp4 round weights; int8, fp8 and nvfp4 activations, too. The natural teacher "
            "is the student before training (teacher: self). Default: none.",
            "choices": FORMATS,
        },
    )
    student_quantization_group: Annotated[int, Range(min=2)] | None = field(
        default=None,
        metadata={
            "help": "For student_quantization: int4. Weights of a row that share a scale. Default: 32. Larger groups "
            "take less room and are less exact: 4.5 bits per weight at 32, 4.125 at 128."
        },
    )
    student_quantization_activations: bool | None = field(
        default=None,
        metadata={
            "help": "For student_quantization: int8, fp8 and nvfp4. Whether activations are rounded, too, as runtimes "
            "with kernels of the format do. Default: yes. false is for runtimes that read these weights and compute "
            "in bf16."
        },
    )
    student_quantization_skip: list[str] | None = field(
        default=None,
        metadata={
            "help": "For student_quantization. Layers that keep full precision: parts of a vision-language model "
            "(vision_tower, connector), router (of experts), words of a layer's name (down_proj, layers.0), or "
            "patterns of the whole name (*.layers.2?.mlp.*). Default: vision_tower, connector and router; a list "
            "replaces it. The head, embeddings and norms are never quantised."
        },
    )

    @property
    def quantisation(self) -> StudentQuantisation | None:
        """As what the student is trained; None: as it is."""
        how = {
            name: getattr(self, f"student_quantization_{name}")
            for name in ("group", "activations", "skip")
            if getattr(self, f"student_quantization_{name}") is not None
        }
        if self.student_quantization is not None:
            return StudentQuantisation.of(self.student_quantization, **how)
        if how:
            raise UserError(
                f"student_quantization_{next(iter(how))} says how a student is quantised, and student_quantization "
                f"names no format. Set it to one of {', '.join(FORMATS)}, or remove the key.",
                because="meaning",
            )
        return None

    def in_full_precision(self) -> Self:
        """The same settings for a student that is trained as it is."""
        settings = copy(self)
        for name in ("", "_group", "_activations", "_skip"):
            setattr(settings, f"student_quantization{name}", None)
        return settings
