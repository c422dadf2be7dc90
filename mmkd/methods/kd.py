"""Knowledge distillation on the whole vocabulary: one divergence per token (Hinton et al. 2015 and successors)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from mmkd.errors import UserError
from mmkd.losses import divergences
from mmkd.losses.divergences import Divergence
from mmkd.losses.fused import Targets
from mmkd.schema import PositiveFloat, Share
from mmkd.teachers.signals import DenseSignal, SparseSignal, TopKSignal
from mmkd.teachers.teacher import Teacher
from mmkd.training.base import DistillationTrainer
from mmkd.training.config import DistillationConfig
from mmkd.training.items import ItemLosses, Supervised
from mmkd.training.method import Method

DIVERGENCES: dict[str, Callable[["KDConfig"], Divergence]] = {
    "forward_kl": lambda config: divergences.forward_kl,
    "reverse_kl": lambda config: divergences.reverse_kl,
    "jsd": lambda config: partial(divergences.jsd, beta=config.beta),
    "skew_kl": lambda config: partial(divergences.skew_kl, skew=config.skew),
    "skew_reverse_kl": lambda config: partial(divergences.skew_reverse_kl, skew=config.skew),
    "tvd": lambda config: divergences.tvd,
    "adaptive_kl": lambda config: partial(divergences.adaptive_kl, mu=config.mu),
}


@dataclass
class KDConfig(DistillationConfig):
    """Settings of method kd."""

    learns_from_rollouts: ClassVar[bool] = True
    combinations: ClassVar[tuple[str, ...]] = ("weights", "gradmag")

    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "What is minimised at each token. forward_kl (default) covers all that the teacher would say, "
            "and is the safest choice. reverse_kl concentrates on what the teacher finds most likely. jsd, "
            "skew_kl and skew_reverse_kl lie between them; tvd and adaptive_kl are further choices.",
            "choices": list(DIVERGENCES),
        },
    )
    temperature: PositiveFloat = field(
        default=1.0,
        metadata={
            "help": "Divides the logits of student and teacher before they are compared. 1 (default) matches the "
            "distributions that are sampled from later; 2 stresses unlikely tokens. The divergence is "
            "multiplied by its square, which keeps the balance with ce_weight."
        },
    )
    beta: Share = field(
        default=0.5,
        metadata={
            "help": "For jsd. The teacher's weight in the mixture: 0 is forward_kl, 1 is reverse_kl, as in TRL."
        },
    )
    skew: Share = field(
        default=0.1,
        metadata={
            "help": "For skew_kl and skew_reverse_kl. Share of the first distribution in the mixture: DistiLLM's "
            "lambda, 0.1 there too."
        },
    )
    mu: Share = field(
        default=0.5,
        metadata={
            "help": "For adaptive_kl. Probability of the teacher's most likely tokens that count as the head; 0.5 "
            "as in its paper."
        },
    )


class KDTrainer(DistillationTrainer[Targets]):
    """Minimises `(1 - ce_weight) * temperature**2 * divergence(teacher, student) + ce_weight * cross-entropy`.

    With `combine: gradmag` the two are balanced first, see `mmkd.training.balance`.
    """

    method = "kd"
    takes_several = True
    config_class = KDConfig
    accepts = (DenseSignal, TopKSignal, SparseSignal)
    args: KDConfig

    @classmethod
    def check_teacher(cls, teacher: Teacher, args: KDConfig) -> None:
        """Raises UserError too when the divergence or the temperature asks for more than the teacher tells."""
        super().check_teacher(teacher, args)
        partial_signal = not issubclass(teacher.signal_type, (DenseSignal, TopKSignal))
        if partial_signal and args.divergence != "forward_kl":
            raise UserError(
                f"{args.divergence} compares with the whole distribution, which a teacher without its tail does not "
                "give. Set teacher_tail: bucket, or divergence: forward_kl.",
                because="meaning",
            )
        if args.temperature != 1 and not teacher.can_temper:
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

    def item_losses(self, student: Supervised, signal: Targets) -> ItemLosses:
        """One divergence per supervised token."""
        objective = DIVERGENCES[self.args.divergence](self.args)
        return self.fused(student, signal, objective, self.args.temperature)


METHOD = Method(KDTrainer)
