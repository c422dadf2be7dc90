"""Settings of method alm."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, ClassVar

from torch import Tensor

from mmkd.errors import UserError
from mmkd.losses import chunks, divergences
from mmkd.losses.chunks import POLICIES, binarised
from mmkd.losses.combine import COMBINATIONS
from mmkd.schema import NonNegativeFloat, PositiveFloat, Range
from mmkd.training.config import DistillationConfig

ChunkLoss = Callable[[Tensor, Tensor], Tensor]
"""(student's, teacher's log-likelihoods of chunks) -> nats per chunk."""

DIVERGENCES: dict[str, Callable[["ALMConfig"], ChunkLoss]] = {
    "forward_kl": lambda config: _binarised(divergences.forward_kl, config),
    "reverse_kl": lambda config: _binarised(divergences.reverse_kl, config),
    "tvd": lambda config: _binarised(divergences.tvd, config),
    "renyi": lambda config: _binarised(partial(divergences.renyi, alpha=config.renyi_alpha), config),
    "kl_limit": lambda config: chunks.binary_kl_limit,
}

OBJECTIVES = ("alm", "uld", "mined")


def _binarised(divergence: divergences.Divergence, config: "ALMConfig") -> ChunkLoss:
    # Times tau, so that neither the size of the gradient nor the balance with other terms depends on it.
    return lambda student, teacher: config.tau * binarised(student, teacher, divergence, config.tau)


@dataclass
class ALMConfig(DistillationConfig):
    """Settings of method alm."""

    learns_from_rollouts: ClassVar[bool] = True
    own_tokens: ClassVar[bool] = True
    weighs_tokens: ClassVar[bool] = False
    combinations: ClassVar[tuple[str, ...]] = COMBINATIONS

    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "What is minimised for each chunk of text, over the two outcomes `this chunk` and `anything "
            "else`. forward_kl (default), reverse_kl, tvd, renyi, or kl_limit: forward_kl for an infinite "
            "tau.",
            "choices": list(DIVERGENCES),
        },
    )
    tau: PositiveFloat = field(
        default=1.0,
        metadata={
            "help": "Temperature. Likelihoods are raised to the power 1 / tau before they are compared; a larger "
            "tau stresses unlikely chunks, and the loss is multiplied by it. The authors train with 100, "
            "but 5 and 1 (default) score higher in their own comparison."
        },
    )
    renyi_alpha: PositiveFloat = field(
        default=2.0, metadata={"help": "For renyi. Order of the divergence; 1 is forward_kl."}
    )
    chunks: str = field(
        default="merge",
        metadata={
            "help": "Which chunks of text are compared. merge (default, as in the paper): weighted by the "
            "probability that a word ends there; a chunk below gamma is joined to the next. unbiased: the "
            "same, but such a chunk is left out. all: every chunk. space: joined up to the next space. For "
            "merge and unbiased a cache of log-probs must be built with this setting, and a served teacher must "
            "give hidden states.",
            "choices": list(POLICIES),
        },
    )
    gamma: Annotated[float, Range(above=0, below=1)] = field(
        default=0.1,
        metadata={
            "help": "For chunks: merge and unbiased. Probability of the end of a word below which a chunk does not "
            "end there; 0.1 as in the paper."
        },
    )
    combine: str = field(
        default="weights",
        metadata={
            "help": "How the terms of the loss are added. weights (default): (1 - ce_weight) of ALM, ce_weight of "
            "cross-entropy and hidden_weight of the hidden states. sum: without weights. gradmag: each "
            "scaled to the same norm of its gradient in the last layer, as the authors do.",
            "choices": ["weights", "sum", "gradmag"],
        },
    )
    hidden_weight: NonNegativeFloat = field(
        default=0.0,
        metadata={
            "help": "Weight of the distance between the last hidden states at the ends of chunks, through a "
            "projection that is learnt too. Default: 0. In the paper it helps students on bytes and hurts "
            "students on subwords."
        },
    )
    objective: str = field(
        default="alm",
        metadata={
            "help": "alm (default), or a baseline to compare with: uld (distance of the sorted probabilities of "
            "the next token) or mined (KL divergence over tokens that are paired by edit distance).",
            "choices": list(OBJECTIVES),
        },
    )
    teacher_max_length: Annotated[int, Range(min=2)] | None = field(
        default=None,
        metadata={
            "help": "Longest row in tokens of the teacher. Default: max_length, or with teacher_view any length."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ce_weight == 1:
            raise UserError(
                "ce_weight is 1, which leaves ALM nothing to do; use method sft for plain fine-tuning.",
                because="meaning",
            )
        if self.packing and self.packing_strategy != "bfd":
            raise UserError(
                f"packing_strategy {self.packing_strategy} cuts sequences where the other tokenizer has no cut. Use "
                "bfd, or packing: false.",
                because="meaning",
            )

    def for_teacher(self, viewed: bool | None = None) -> "ALMConfig":
        """The settings by which rows become the teacher's tokens; `viewed`: behind a prompt of its own."""
        side = copy(self)
        viewed = self.teacher_view is not None if viewed is None else viewed
        # What stands before the teacher's answers must not cost them their ends.
        side.max_length = self.teacher_max_length or (None if viewed else self.max_length)
        side.packing = side.padding_free = side.shuffle_dataset = False
        # These are about the student's tokenizer.
        side.chat_template_path = side.eos_token = side.pad_token = None
        return side

    @property
    def teacher_length(self) -> int | None:
        """Tokens of the longest row that a teacher reads; None: any number."""
        return self.for_teacher().max_length

    @property
    def term_weights(self) -> dict[str, float]:
        """The weight of each term of the loss, by the term's name in the logs."""
        return {**super().term_weights, "hidden": self.hidden_weight}

    @property
    def needs_boundaries(self) -> bool:
        """Whether it matters how probable the end of a word is."""
        return self.objective == "alm" and self.chunks in ("unbiased", "merge")

    @property
    def needs_hidden(self) -> bool:
        """Whether the teacher's hidden states are compared, too."""
        return self.objective != "alm" or self.hidden_weight > 0
