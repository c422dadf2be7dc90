"""TAID: the student follows an intermediate teacher that moves from itself to the teacher (2501.16937)."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from torch import Tensor
from transformers.trainer_callback import ExportableState, TrainerCallback

from mmkd.errors import UserError
from mmkd.losses.divergences import entropy, forward_kl, interpolated_log_probs
from mmkd.losses.fused import Targets
from mmkd.schema import NonNegativeFloat, Range, Share
from mmkd.training.feature_config import FeatureConfig
from mmkd.training.feature_trainer import FeatureTrainer
from mmkd.training.items import ItemLosses, Supervised
from mmkd.training.method import Method


@dataclass
class TAIDConfig(FeatureConfig):
    """Settings of method taid."""

    learns_from_rollouts: ClassVar[bool] = True
    combinations: ClassVar[tuple[str, ...]] = ("weights", "gradmag")

    t_start: Share = field(
        default=0.4,
        metadata={
            "help": "Where the interpolation starts: 0 is the student, 1 the teacher. 0.4 (default) as in the "
            "paper, which also uses 0.2."
        },
    )
    t_end: Share = field(default=1.0, metadata={"help": "Where the interpolation ends. 1 (default) is the teacher."})
    taid_alpha: NonNegativeFloat = field(
        default=5e-4,
        metadata={
            "help": "How fast t moves up when the loss falls. At the default, runs with t_end 1 of fewer than 1 / "
            "taid_alpha = 2,000 updates follow the linear schedule; set it to about 8 / updates to let the "
            "loss decide."
        },
    )
    taid_beta: Annotated[float, Range(min=0, below=1)] = field(
        default=0.99, metadata={"help": "Momentum of the measured progress; 0.99 as in the paper."}
    )
    adaptive: bool = field(
        default=True,
        metadata={
            "help": "Move t faster while the loss falls. false follows the straight line from t_start to t_end."
        },
    )
    progress_measure: str = field(
        default="cross_entropy",
        metadata={
            "help": "The loss whose decrease counts as progress. cross_entropy (default): as in the authors' code, "
            "which gave the published numbers. kl: as in the text of the paper; it changes more.",
            "choices": ["cross_entropy", "kl"],
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.t_start > self.t_end:
            raise UserError(
                f"t_start is {self.t_start} and t_end {self.t_end}; t moves up from t_start to t_end within [0, 1].",
                because="meaning",
            )
        if self.ce_weight == 1:
            raise UserError(
                "ce_weight is 1, which leaves TAID nothing to do; use method sft for plain fine-tuning.",
                because="meaning",
            )


class TAIDSchedule(TrainerCallback, ExportableState):
    """The interpolation parameter t, kept in the trainer's state, so that a resumed run goes on where it was.

    `t <- min(t_end, max(linear, t + alpha * sigmoid(m) * (1 - t)))`, with m the momentum of the relative decrease of
    the loss and linear the straight line from t_start to t_end (2501.16937, algorithm 1).
    """

    _ATTRIBUTES = ("t", "momentum", "delta", "previous_loss")

    def __init__(self, t_start: float, t_end: float, alpha: float, beta: float, adaptive: bool = True):
        self.t_start, self.t_end, self.alpha, self.beta, self.adaptive = t_start, t_end, alpha, beta, adaptive
        self._reset()

    def update(self, loss: float, step: int, total_steps: int) -> None:
        """Moves t once, after the optimizer step number `step` (from 0) whose mean loss over all ranks was `loss`."""
        if self.previous_loss is not None:
            progress = (self.previous_loss - loss) / (self.previous_loss + 1e-15)
            self.momentum = self.beta * self.momentum + (1 - self.beta) * progress
            self.delta = self.alpha * _sigmoid(self.momentum) * (1 - self.t)
            linear = self.t_start + (self.t_end - self.t_start) * step / total_steps
            self.t = min(self.t_end, max(linear, self.t + self.delta)) if self.adaptive else linear
        self.previous_loss = loss

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into trainer_state.json."""
        arguments = ("t_start", "t_end", "alpha", "beta", "adaptive")
        return {
            "args": {name: getattr(self, name) for name in arguments},
            "attributes": {name: getattr(self, name) for name in self._ATTRIBUTES},
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes up the checkpoint's t: the Trainer itself restores callbacks only when asked to restore all."""
        if state.global_step == 0:
            self._reset()
        else:
            self._restore(state.stateful_callbacks[type(self).__name__]["attributes"])

    def _reset(self) -> None:
        self._restore({"t": self.t_start, "momentum": 0.0, "delta": 0.0, "previous_loss": None})

    def _restore(self, attributes: dict[str, Any]) -> None:
        self.t: float = attributes["t"]
        self.momentum: float = attributes["momentum"]
        self.delta: float = attributes["delta"]
        self.previous_loss: float | None = attributes["previous_loss"]


def _sigmoid(value: float) -> float:
    # By tanh, which saturates where exp would overflow.
    return (1 + math.tanh(value / 2)) / 2


class TAIDTrainer(FeatureTrainer[Targets]):
    """Minimises KL(p_t || student), p_t = softmax((1 - t) student + t teacher) with the student there detached."""

    method = "taid"
    takes_several = True
    config_class = TAIDConfig
    step_means = ("progress_loss",)
    args: TAIDConfig
    _paper: ClassVar[dict[str, str]] = {
        "title": "TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in Language "
        "Models",
        "id": "2501.16937",
    }

    def method_callbacks(self, args: TAIDConfig) -> list[TrainerCallback]:
        """The schedule, which the Trainer saves and restores with its state."""
        return [TAIDSchedule(args.t_start, args.t_end, args.taid_alpha, args.taid_beta, args.adaptive)]

    @property
    def schedule(self) -> TAIDSchedule:
        """The one in use; `restore_callback_states_from_checkpoint` puts another in its place."""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, TAIDSchedule))

    def item_losses(self, student: Supervised, signal: Targets) -> ItemLosses:
        """One KL to the intermediate teacher per supervised token."""
        return self.fused(student, signal, self._objective)

    def _objective(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        target = interpolated_log_probs(student, teacher, self.schedule.t)
        divergence = forward_kl(student, target)
        progress = divergence if self.args.progress_measure == "kl" else divergence + entropy(target)
        return divergence, {"progress_loss": progress.detach()}

    def step_ended(self, means: dict[str, float]) -> None:
        """Moves t by this step's mean loss; evaluation never comes here."""
        self.schedule.update(means["progress_loss"], self.state.global_step, self.state.max_steps)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds t, its momentum and its last adaptive increment."""
        schedule = self.schedule
        logs |= {"taid_t": schedule.t, "taid_momentum": schedule.momentum, "taid_delta": schedule.delta}
        super().log(logs, start_time)


METHOD = Method(TAIDTrainer)
