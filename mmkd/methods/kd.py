"""Knowledge distillation on the whole vocabulary: one divergence per token (Hinton et al. 2015 and successors)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, ClassVar

from torch import Tensor
from transformers.trainer_callback import TrainerCallback

from mmkd.errors import UserError
from mmkd.losses import divergences
from mmkd.losses.divergences import Divergence
from mmkd.losses.fused import Targets
from mmkd.losses.narrowed import StudentTopK
from mmkd.losses.sampled_kl import ESTIMATORS
from mmkd.schema import NonNegativeFloat, PositiveFloat, PositiveInt, Range, Share
from mmkd.teachers.batch import Batch, View
from mmkd.teachers.signals import DenseSignal, MixedSignal, SparseSignal, TopKSignal
from mmkd.teachers.teacher import Teacher
from mmkd.training.answers import Placed
from mmkd.training.feature_config import FeatureConfig
from mmkd.training.feature_trainer import FeatureTrainer
from mmkd.training.items import ItemLosses, Supervised
from mmkd.training.logit_difference import DIFFERENCES, LogitDifferenceKeys, listed_tokens
from mmkd.training.method import Method

from .kd_contrastive import (
    CONTRASTIVE,
    ROLLOUT_TOKEN,
    check_contrastive,
    counts_of,
    own_share,
    signal_at,
)
from .kd_sampled import (
    LOG_RATIO,
    SAMPLED,
    SampledBaseline,
    check_sampled,
    check_told,
    labels_alone,
    own_tokens,
    sampled_objective,
    sampled_targets,
)

DIVERGENCES: dict[str, Callable[["KDConfig"], Divergence]] = {
    "forward_kl": lambda config: divergences.forward_kl,
    "reverse_kl": lambda config: divergences.reverse_kl,
    "jsd": lambda config: partial(divergences.jsd, beta=config.beta),
    "skew_kl": lambda config: partial(divergences.skew_kl, skew=config.skew),
    "skew_reverse_kl": lambda config: partial(divergences.skew_reverse_kl, skew=config.skew),
    "tvd": lambda config: divergences.tvd,
    "adaptive_kl": lambda config: partial(divergences.adaptive_kl, mu=config.mu),
    **DIFFERENCES,
}


@dataclass
class KDConfig(LogitDifferenceKeys, FeatureConfig):
    """Settings of method kd."""

    learns_from_rollouts: ClassVar[bool] = True
    combinations: ClassVar[tuple[str, ...]] = ("weights", "gradmag")

    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "What is minimised at each token. forward_kl (default) covers all that the teacher would say, "
            "and is the safest choice. reverse_kl concentrates on what the teacher finds most likely. jsd, "
            "skew_kl and skew_reverse_kl lie between them; tvd and adaptive_kl are further choices. bild compares "
            "the differences between the 8 most likely logits (use temperature: 3, as its paper does), dbild those of "
            "as many as matter at each token. "
            "sampled_reverse_kl estimates reverse_kl from the tokens that the student sampled, for teachers that tell "
            "no more than their log-probs; it needs on_policy_fraction: 1. contrastive (DistiLLM-2): skew_kl on the "
            "data's answers, skew_reverse_kl on the student's own; use it with rollout_rows: add.",
            "choices": [*DIVERGENCES, SAMPLED, CONTRASTIVE],
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
    divergence_weight: NonNegativeFloat = field(
        default=1.0,
        metadata={
            "help": "Multiplies the divergence once more. 0 leaves it out, to learn from features alone; it is still "
            "logged. 0.25 with temperature: 2 undoes the square of the temperature. Default: 1."
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
            "help": "For skew_kl, skew_reverse_kl and contrastive. Share of the first distribution in the mixture: "
            "DistiLLM's lambda, 0.1 there too."
        },
    )
    contrastive_share: Share = field(
        default=0.5,
        metadata={
            "help": "For contrastive. Weight of the student's own answers in the loss; the data's answers have the "
            "rest. 0.5 (default) weighs both alike, as in the authors' configurations."
        },
    )
    contrastive_share_end: Share | None = field(
        default=None,
        metadata={
            "help": "For contrastive. Move contrastive_share to this value over the first half of the run. 0.75 is "
            "the authors' gradual schedule. Default: it stays."
        },
    )
    mu: Share = field(
        default=0.5,
        metadata={
            "help": "For adaptive_kl. Probability of the teacher's most likely tokens that count as the head; 0.5 "
            "as in its paper."
        },
    )
    student_top_k: PositiveInt | None = field(
        default=None,
        metadata={
            "help": "Compare student and teacher on the student's so many most likely tokens, with all others as one "
            "outcome. Meant for reverse_kl. Needs the teacher's whole distribution: a local teacher, or its hidden "
            "states. Default: compare all tokens."
        },
    )
    estimator: str = field(
        default="k1",
        metadata={
            "help": "For sampled_reverse_kl, with q the student and p the teacher. k1 (default): log(q/p), which is "
            "unbiased. k3: p/q - 1 - log(p/q), which is never negative and varies less. With sampled_as: "
            "policy_gradient both have the same gradient, and differ in what is logged as the loss.",
            "choices": list(ESTIMATORS),
        },
    )
    sampled_as: str = field(
        default="policy_gradient",
        metadata={
            "help": "For sampled_reverse_kl. policy_gradient (default): log(p/q) is the reward of a token, which "
            "gives an unbiased gradient of the reverse KL. loss: differentiate the estimator itself, for k3 only; "
            "the mean of that gradient is the one of the forward KL.",
            "choices": ["policy_gradient", "loss"],
        },
    )
    sampled_baseline: str = field(
        default="mean",
        metadata={
            "help": "For sampled_as: policy_gradient. mean (default): rewards are compared with their running mean "
            "over the steps before, which lowers the variance and leaves the mean gradient alone. none: rewards as "
            "they are.",
            "choices": ["mean", "none"],
        },
    )
    clip_ratio: Annotated[float, Range(above=0, below=1)] | None = field(
        default=0.2,
        metadata={
            "help": "For sampled_as: policy_gradient with rollout_server. A token whose probability has changed by "
            "more than this share since it was sampled is not pushed further, as in PPO. 0.2 (default) as in verl; "
            "null clips nothing."
        },
    )

    @property
    def term_weights(self) -> dict[str, float]:
        """The weight of each term of the loss, by the term's name in the logs."""
        weights = super().term_weights
        return {**weights, "divergence": self.divergence_weight * weights["divergence"]}

    @property
    def sampled(self) -> bool:
        """Whether only the tokens that the student sampled are compared."""
        return self.divergence == SAMPLED

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sampled(self)
        check_contrastive(self)
        if not any(self.term_weights.values()):
            raise UserError(
                "divergence_weight is 0, and the loss has no other term. Set ce_weight or features, or leave "
                "divergence_weight out.",
                because="meaning",
            )
        if self.divergence in DIFFERENCES and self.student_top_k is not None:
            raise UserError(
                f"divergence: {self.divergence} chooses the tokens that it compares, of teacher and student, and "
                "student_top_k would choose others. Remove student_top_k (bild_top_k or dbild_max_k says how many).",
                because="meaning",
            )


class KDTrainer(FeatureTrainer[Targets]):
    """Minimises `(1 - ce_weight) * temperature**2 * divergence(teacher, student) + ce_weight * cross-entropy`.

    With `combine: gradmag` the two are balanced first, see `mmkd.training.balance`. For `divergence:
    sampled_reverse_kl` see `mmkd.losses.sampled_kl`.
    """

    method = "kd"
    takes_several = True
    config_class = KDConfig
    accepts = (DenseSignal, TopKSignal, SparseSignal)
    # Every step reports it that has a baseline, and no other.
    step_means = (LOG_RATIO,)
    args: KDConfig

    @classmethod
    def check_teacher(cls, teacher: Teacher, args: KDConfig) -> None:
        """Raises UserError too when the divergence or the temperature asks for more than the teacher tells."""
        super().check_teacher(teacher, args)
        check_told(teacher, args)

    def method_callbacks(self, args: KDConfig) -> list[TrainerCallback]:
        """The baseline of sampled tokens, which the Trainer saves and restores with its state."""
        return [SampledBaseline()] if args.sampled and args.sampled_baseline == "mean" else []

    def with_rollouts(self, batch: Batch, placed: Mapping[int, Placed]) -> Batch:
        """The base's; where only sampled tokens are compared, the student learns from no others."""
        batch = super().with_rollouts(batch, placed)
        return own_tokens(batch) if self.args.sampled else batch

    def early_question(self) -> Callable[[Batch], Batch] | None:
        """The base's; where only sampled tokens are compared, about no others."""
        question = super().early_question()
        if question is None or not self.args.sampled:
            return question
        return lambda batch: question(own_tokens(batch))

    def ask_ahead(self, batch: Batch, alone: bool) -> Batch:
        """The base's; where only sampled tokens are compared, nothing of a batch without rollouts."""
        batch = super().ask_ahead(batch, alone)
        nothing = self.args.sampled and self.model.training and batch.student.rollout is None
        return own_tokens(replace(batch, asked=None)) if nothing else batch

    def ask_teacher(self, teacher: Teacher[Any], name: str, view: View) -> Any:
        """The base's; about rollouts of which only the sampled tokens count, a server tells their log-probs alone."""
        sampled = self.args.sampled and view.rollout is not None
        return super().ask_teacher(labels_alone(teacher) if sampled else teacher, name, view)

    def count_items(self, batch: Batch) -> dict[str, Tensor]:
        """The base's; of a contrast the student's own tokens apart from the data's."""
        counts = super().count_items(batch)
        return counts | counts_of(batch) if self.args.divergence == CONTRASTIVE else counts

    def item_losses(self, student: Supervised, signal: Any) -> ItemLosses:
        """One divergence per supervised token."""
        args, weights = self.args, self.token_weights(student, signal)
        if args.divergence == CONTRASTIVE:
            return self._contrasted(student, MixedSignal.of(signal), weights)
        if args.sampled and self.model.training:
            baselines = (part for part in self.callback_handler.callbacks if isinstance(part, SampledBaseline))
            objective = sampled_objective(args, next(baselines, None))
            targets = MixedSignal.of(signal).map(lambda said: sampled_targets(said, student))
            return self.fused(student, targets, objective, weights=weights)
        if args.student_top_k is not None:
            signal = MixedSignal.of(signal).map(partial(StudentTopK, k=args.student_top_k))
        if args.divergence in DIFFERENCES:
            signal = listed_tokens(signal)
        # An evaluation has no sampled tokens, and compares whole distributions.
        objective = DIVERGENCES["reverse_kl" if args.sampled else args.divergence](args)
        return self.fused(student, signal, objective, args.temperature, weights)

    def _contrasted(self, student: Supervised, signal: MixedSignal[Any], weights: Tensor | None) -> ItemLosses:
        """The data's tokens and the student's own, each with a divergence, a weight and a count of their own."""
        args, own = self.args, student.own
        # An evaluation has the data's answers alone.
        share = own_share(args, self.state.global_step, self.state.max_steps) if self.model.training else 0.0
        parts: dict[str, ItemLosses] = {}
        for name, tokens, divergence, weight, kind in (
            ("data", ~own, "skew_kl", 1 - share, "token"),
            ("own", own, "skew_reverse_kl", share, ROLLOUT_TOKEN),
        ):
            said: MixedSignal[Any] = signal.map(partial(signal_at, tokens=tokens))
            if args.student_top_k is not None:
                said = said.map(partial(StudentTopK, k=args.student_top_k))
            theirs = None if weights is None else weights[tokens]
            objective = DIVERGENCES[divergence](args)
            losses = self.mixed(student.at(tokens), said, objective, args.temperature, 0.0, theirs)
            parts[name] = ItemLosses({kind: weight * losses.totals["token"]}, losses.reports)
        whole = ItemLosses.of_parts(parts, ("divergence",))
        terms, reports = {"divergence": whole.totals}, whole.reports
        if args.ce_weight:
            terms["ce"], of_data = self.cross_entropy(student, weights)
            reports = reports | of_data
        return ItemLosses(self.combined(terms), reports)

    def step_ended(self, means: dict[str, float]) -> None:
        """Moves the baseline of sampled tokens."""
        for part in self.callback_handler.callbacks:
            if isinstance(part, SampledBaseline):
                part.update(means[LOG_RATIO])


METHOD = Method(KDTrainer)
