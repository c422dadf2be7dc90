"""Settings of method llava_kd."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from mmkd.errors import UserError
from mmkd.schema import NonNegativeFloat, PositiveFloat, Share
from mmkd.seams.trainer_seam import with_json_keys
from mmkd.training.feature_config import FeatureConfig
from mmkd.training.logit_difference import DIFFERENCES, LogitDifferenceKeys

from .llava_kd_switch import SWITCH, Switch, check_switch

MATCHING_COSTS = ("manhattan", "euclidean")


@dataclass
class LLaVAKDConfig(LogitDifferenceKeys, FeatureConfig):
    """Settings of method llava_kd."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = with_json_keys(FeatureConfig, "switch")
    combinations: ClassVar[tuple[str, ...]] = ("weights", "gradmag")
    learns_from_rollouts: ClassVar[bool] = True

    ce_weight: Share = field(
        default=0.0,
        metadata={"help": "Always 0. alpha, beta and gamma weigh the other terms; cross-entropy counts 1."},
    )
    alpha: NonNegativeFloat = field(
        default=1.0,
        metadata={
            "help": "Weight of the KL divergence from the teacher on the tokens of the answer; 1 as in the paper."
        },
    )
    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "What alpha weighs: how answers are compared with the teacher's. forward_kl (default): as in the "
            "paper. bild: the differences between the 8 most likely logits. dbild: those of as many as matter at each "
            "token, as Switch-KD does. Use temperature: 3 with both.",
            "choices": ["forward_kl", *DIFFERENCES],
        },
    )
    temperature: PositiveFloat = field(
        default=1.0,
        metadata={
            "help": "Divides the logits of student and teacher before answers are compared. The divergence is "
            "multiplied by its square. 1 (default) as in the paper; 3 in those of bild and dbild."
        },
    )
    beta: NonNegativeFloat = field(
        default=1.0,
        metadata={"help": "Weight of the KL divergence from the teacher on the visual tokens; 1 as in the paper."},
    )
    gamma: NonNegativeFloat = field(
        default=0.5,
        metadata={
            "help": "Weight of the distance between the relations of visual tokens. 0.5 as in the paper; the "
            "authors' code has 1."
        },
    )
    relation_on: str = field(
        default="logits",
        metadata={
            "help": "Features by which visual tokens are related. logits (default): as in the paper. hidden: the "
            "last hidden states, which costs less with a large vocabulary and needs no shared one.",
            "choices": ["logits", "hidden"],
        },
    )
    relation_normalized: bool = field(
        default=False,
        metadata={
            "help": "Centre the features of each token and scale them to length 1 before they are related. false "
            "(default) is the paper's raw product, in which tokens with a large norm dominate."
        },
    )
    visual_tokens: str = field(
        default="same",
        metadata={
            "help": "How visual tokens are compared if student and teacher cut an image into different numbers of "
            "them. same (default): stop. pool: average the finer grid to the coarser one. hungarian: match each token "
            "of the coarser side with the one of the finer side that is most like it (EM-KD), and leave out the rest.",
            "choices": ["same", "pool", "hungarian"],
        },
    )
    matching_cost: str = field(
        default="manhattan",
        metadata={
            "help": "For visual_tokens: hungarian. The distance between the logits of two tokens. manhattan (default) "
            "as in EM-KD. euclidean is a matrix product, which takes a small part of the time on a CPU.",
            "choices": list(MATCHING_COSTS),
        },
    )
    vsd_weight: NonNegativeFloat = field(
        default=0.0,
        metadata={
            "help": "Weight of EM-KD's vision semantic distillation (VSD): the mean squared difference between the "
            "logits of student and teacher at visual tokens. 0 (default): none."
        },
    )
    vlad_weight: NonNegativeFloat = field(
        default=0.0,
        metadata={
            "help": "Weight of EM-KD's vision-language alignment distillation (VLAD): how alike visual tokens and the "
            "answer's tokens are, student against teacher. 0 (default): none."
        },
    )
    switch: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Switch-KD: send the student's visual output through the teacher's connector and language model, "
            "and bring the answers there near the teacher's own. {weight: 1.0, divergence: dbild, temperature: 3.0} "
            "are its settings and their defaults. It teaches the vision tower and nothing else, and needs a local "
            "teacher with a tower of the same width. Default: none."
        },
    )
    visual_mismatch: str = field(
        default="error",
        metadata={
            "help": "The old name of visual_tokens, which still works: error is same, pool is pool.",
            "choices": ["error", "pool"],
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ce_weight:
            raise UserError(
                f"ce_weight is {self.ce_weight}, but llava_kd adds its terms to a cross-entropy of weight 1; set "
                "alpha, beta and gamma instead.",
                because="meaning",
            )
        if not sum(weight for name, weight in self.term_weights.items() if name != "ce"):
            raise UserError(
                "alpha, beta and gamma are 0, and no other term has a weight, which leaves nothing of the teacher; "
                "use method sft.",
                because="meaning",
            )
        if self.visual_mismatch == "pool":
            if self.visual_tokens == "hungarian":
                raise UserError(
                    "visual_tokens is hungarian, and visual_mismatch, its old name, says pool: remove it.",
                    because="meaning",
                )
            self.visual_tokens = "pool"
        if self.switching is not None:
            check_switch(self)

    @property
    def compares_images(self) -> bool:
        """Whether visual tokens are compared, and not only answers."""
        return self.beta + self.gamma + self.vsd_weight + self.vlad_weight > 0

    @property
    def term_weights(self) -> dict[str, float]:
        """The weight of each term of the loss, by the term's name in the logs."""
        switch = self.switching
        switched = {} if switch is None else {SWITCH: switch.weight}
        return {"ce": 1.0, "divergence": self.alpha, **self.visual_weights, **switched, **self.feature_weights}

    @property
    def switching(self) -> Switch | None:
        """The settings of the switch; None without one."""
        return Switch.of(self.switch)

    @property
    def differentiates_teacher(self) -> bool:
        """See DistillationConfig: the switch reaches the student through the teacher."""
        return self.switching is not None

    @property
    def visual_weights(self) -> dict[str, float]:
        """Those of the terms that compare visual tokens."""
        return {
            "visual_kl": self.beta,
            "relation_distance": self.gamma,
            "visual_mse": self.vsd_weight,
            "alignment_distance": self.vlad_weight,
        }
