"""kd on the tokens that the student sampled: what is asked, checked and compared, and the baseline of rewards."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_callback import ExportableState, TrainerCallback

from mmkd.errors import UserError
from mmkd.losses.fused import Objective, Targets
from mmkd.losses.narrowed import SampledTargets
from mmkd.losses.sampled_kl import policy_gradient, sampled_kl
from mmkd.teachers.batch import Batch, View
from mmkd.teachers.server import LabelServerTeacher, ServerTeacher
from mmkd.teachers.signals import DenseSignal, LabelSignal, TopKSignal
from mmkd.teachers.teacher import Teacher
from mmkd.training.items import Supervised
from mmkd.training.logit_difference import check_temperature

SAMPLED = "sampled_reverse_kl"
LOG_RATIO = "sampled_log_ratio"
"""The report log q - log p of the sampled tokens."""


class SampledBaseline(TrainerCallback, ExportableState):
    """The running mean of log q - log p over the sampled tokens of the steps before, of all ranks.

    It does not depend on the tokens of the step that it serves, so that the mean of the gradient stays what it is; the
    mean of the step's own tokens would. It does not depend on how a batch is cut, either.
    """

    _MOMENTUM = 0.9

    def __init__(self, mean: float | None = None):
        self.mean = mean

    def update(self, mean: float) -> None:
        """Takes in the mean of the optimizer step that ends."""
        self.mean = mean if self.mean is None else self._MOMENTUM * self.mean + (1 - self._MOMENTUM) * mean

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into trainer_state.json."""
        return {"args": {}, "attributes": {"mean": self.mean}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes up the checkpoint's mean: the Trainer itself restores callbacks only when asked to restore all."""
        saved = state.stateful_callbacks.get(type(self).__name__, {}) if state.global_step else {}
        self.mean = saved.get("attributes", {}).get("mean")


def sampled_objective(args: Any, baseline: SampledBaseline | None) -> Objective:
    """What is minimised at a sampled token; reports the log-ratio, and of a policy gradient the share clipped."""
    mean = 0.0 if baseline is None or baseline.mean is None else baseline.mean

    def objective(student: Tensor, known: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        log_q, log_p = student[:, 0], known[:, 0]
        sampling = known[:, 1] if known.shape[1] > 1 else None
        estimate = sampled_kl(log_q, log_p, args.estimator)
        reports = {LOG_RATIO: (log_q - log_p).detach()}
        if args.sampled_as == "loss":
            return estimate, reports
        surrogate, clipped = policy_gradient(log_q, log_p, sampling, baseline=mean, clip_ratio=args.clip_ratio)
        if sampling is not None:
            reports["clipped_tokens"] = clipped.to(log_q.dtype)
        # The value is the estimate of the KL, which means something in the logs, the gradient the surrogate's.
        return surrogate - surrogate.detach() + estimate.detach(), reports

    return objective


def sampled_targets(signal: DenseSignal | TopKSignal | LabelSignal, student: Supervised) -> Targets:
    """What a teacher says of the tokens that the student sampled."""
    sampling = None if student.rollout is None else student.rollout.log_probs
    if isinstance(signal, DenseSignal):
        return SampledTargets(student.labels, targets=signal, sampling_log_probs=sampling)
    told = signal.log_probs if isinstance(signal, LabelSignal) else signal.label_log_probs
    assert told is not None
    return SampledTargets(student.labels, told, sampling_log_probs=sampling)


def labels_alone(teacher: Teacher[Any]) -> Teacher[Any]:
    """The teacher as it is asked about sampled tokens: a server of text tells their log-probs and no others."""
    return LabelServerTeacher(teacher) if isinstance(teacher, ServerTeacher) else teacher


def own_tokens(batch: Batch) -> Batch:
    """The batch in which only the tokens that the student sampled itself are learnt from."""

    def own(view: View) -> View:
        chosen = torch.zeros_like(view.labels, dtype=torch.bool) if view.rollout is None else view.rollout.own
        return view.learnt_from(chosen)

    return replace(batch.with_teacher_views(own), student=own(batch.student))


def check_sampled(args: Any) -> None:
    """Raises UserError for settings under which sampled tokens do not estimate the reverse KL."""
    if not args.sampled:
        return
    if not args.answers_everything:
        raise UserError(
            "divergence: sampled_reverse_kl is an average over tokens that the student samples, and the data's tokens "
            f"were not (on_policy_fraction is {args.on_policy_fraction}, rollout_rows: {args.rollout_rows}). Set "
            "on_policy_fraction: 1 and rollout_rows: replace, or divergence: reverse_kl.",
            because="meaning",
        )
    sampling = {"rollout_temperature": args.rollout_temperature, "rollout_top_p": args.rollout_top_p}
    for key, value in {**sampling, "temperature": args.temperature}.items():
        if value != 1:
            raise UserError(
                f"{key} is {value}, but divergence: sampled_reverse_kl needs tokens sampled from the student's own "
                f"distribution, and compares there. Set {key}: 1, or divergence: reverse_kl.",
                because="meaning",
            )
    if args.rollouts == "interleaved":
        raise UserError(
            "With rollouts: interleaved the teacher replaces tokens of the student that it finds unlikely, and those "
            "that are left are no sample of the student's distribution, which divergence: sampled_reverse_kl needs. "
            "Set rollouts: student, or divergence: reverse_kl.",
            because="meaning",
        )
    if args.sampled_as == "loss" and args.estimator == "k1":
        raise UserError(
            "The derivative of k1 = log(q/p) by the student does not depend on the teacher, so that sampled_as: loss "
            "would teach nothing. Set sampled_as: policy_gradient, or estimator: k3.",
            because="meaning",
        )
    if args.student_top_k is not None:
        raise UserError(
            "student_top_k compares several tokens at a position, and divergence: sampled_reverse_kl the sampled one "
            "only. Remove student_top_k, or set divergence: reverse_kl.",
            because="meaning",
        )


def check_told(teacher: Teacher[Any], args: Any) -> None:
    """Raises UserError when divergence, tokens or temperature ask for more than the teacher tells."""
    whole = issubclass(teacher.signal_type, DenseSignal)
    if not whole and not issubclass(teacher.signal_type, TopKSignal) and args.divergence != "forward_kl":
        raise UserError(
            f"{args.divergence} compares with the whole distribution, which a teacher without its tail does not "
            "give. Set teacher_tail: bucket, or divergence: forward_kl.",
            because="meaning",
        )
    if not whole and args.student_top_k is not None:
        raise UserError(
            "student_top_k looks up the student's most likely tokens in the teacher's distribution, and this teacher "
            "lists its own most likely tokens only. Remove student_top_k, or use the teacher's hidden states "
            "(teacher_server_signal: hidden, cache_signal: hidden) or a local teacher.",
            because="upstream",
        )
    check_temperature(teacher, args)
