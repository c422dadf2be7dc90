"""What every method reads from a recipe."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from .kernels import KERNELS, check_recipe
from .rollout_config import RolloutConfig


@dataclass
class DistillationConfig(RolloutConfig):
    """What every method reads, besides everything of trl's SFTConfig."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*RolloutConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

    ce_weight: float = field(
        default=0.0,
        metadata={
            "help": "Share of the cross-entropy with the data's own tokens, between 0 and 1; the divergence gets the "
            "rest. 0 (default) is pure distillation; try 0.1 to 0.5 when the data is better than the teacher."
        },
    )
    chunk_size: int = field(
        default=512,
        metadata={
            "help": "Supervised tokens whose logits exist at a time. Larger is slightly faster on a GPU and costs "
            "chunk_size x vocabulary x 2 bytes (bf16) per model."
        },
    )
    precise_logits: bool = field(
        default=False,
        metadata={
            "help": "Form the student's logits in fp32 from bf16 weights, and sum the head's gradient in fp32. Lowers "
            "the gradient's rounding error several times; costs little on a GPU and much on a CPU."
        },
    )
    kernel: str = field(
        default="auto",
        metadata={
            "help": "Who computes kd's forward_kl, reverse_kl and jsd: torch (mmkd's own), triton (TRL's, on CUDA) or "
            "liger (pip install liger-kernel). The last two need a teacher model and run in steps that are not "
            "logged, once the first batch has shown the loss and the gradients of torch. auto (default) is torch "
            "everywhere, since none was measured on a GPU yet.",
            "choices": list(KERNELS),
        },
    )
    trainable: list[str] | None = field(
        default=None,
        metadata={
            "help": "Parts of a vision-language student that are trained, of vision_tower, connector and "
            "language_model; the others are frozen. Default: all."
        },
    )
    on_bad_row: str = field(
        default="error",
        metadata={
            "help": "What to do with a row whose images are missing, broken or cut by max_length: error (default), or "
            "skip, which leaves it out, warns, and counts it in the logs as unreadable_rows or overlong_rows.",
            "choices": ["error", "skip"],
        },
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of from_pretrained for a teacher given by name, such as dtype."},
    )

    def __post_init__(self) -> None:
        # transformers wants this said before it allows bf16 on a machine without an accelerator.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        if not 0 <= self.ce_weight <= 1:
            raise ValueError(f"ce_weight is {self.ce_weight}; it is a share and must lie between 0 and 1.")
        if self.on_policy_fraction and self.ce_weight:
            raise ValueError(
                "ce_weight is the share of the data's own answers, which a rollout replaces: it would train the "
                "student on what it says anyway. Set ce_weight: 0, or on_policy_fraction: 0."
            )
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size is {self.chunk_size}; at least one token must be compared at a time.")
        if self.on_bad_row not in ("error", "skip"):
            raise ValueError(f"on_bad_row is {self.on_bad_row!r}; choose error or skip.")
        if self.loss_type != "nll" or self.label_smoothing_factor:
            raise ValueError(
                "loss_type and label_smoothing_factor change SFT's own loss, which distillation replaces. Remove them."
            )
        check_recipe(self)

    @property
    def kernel_beta(self) -> float | None:
        """The divergence as Liger and TRL write it, from 0, forward KL, to 1, reverse KL; None: one they have not."""
        return None
