"""What a run reports: sums over ranks and steps behind every mean, speed and the time left."""

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from trl.trainer.sft_trainer import SFTTrainer

from mmkd.preparation.collation import BAD_ROWS

from .clock import StepClock
from .counts import CountingTrainer


class ReportingTrainer(CountingTrainer, SFTTrainer):
    """trl's SFTTrainer whose logs are means over the items of all ranks since the last log."""

    cumulative = ("supervised_tokens", "training_seconds", "rollout_tokens", *BAD_ROWS)
    step_means: ClassVar[tuple[str, ...]] = ()
    """Reports that are also wanted once per optimizer step. Empty: nothing is reduced."""

    def _start_reports(self) -> None:
        """Called before anything can be logged."""
        self._sums: dict[str, dict[str, Float[Tensor, 2]]] = {"train": {}, "eval": {}}
        self._step_sums: dict[str, Float[Tensor, 2]] = {}
        self._prefix = "eval"
        # Set to a list, it gets the reports of every batch of an evaluation, for who wants to resample them.
        self.batch_reports: list[dict[str, tuple[float, float]]] | None = None
        self._clock = StepClock()
        self._totals = {}
        self._evaluating = False

    def _unlogged(self) -> dict[str, Float[Tensor, "2"]]:
        return self._sums["train"]

    def _spent_unlogged(self, spent: tuple[float, int] | None = None) -> tuple[float, int]:
        self._clock.spent = self._clock.spent if spent is None else spent
        return self._clock.spent

    def _reports_now(self) -> bool:
        """Whether this micro-batch computes diagnostics: always in evaluation, else in the steps that are logged."""
        if not self.model.training or self.args.logging_strategy != "steps":
            return not self.model.training or self.args.logging_strategy != "no"
        step = self.state.global_step + 1
        return step % max(1, int(self.state.logging_steps)) == 0 or (step == 1 and self.args.logging_first_step)

    @property
    def logs_apart(self) -> bool:
        """Whether this micro-batch is of a logged step whose log covers others before it as well."""
        every = self.state.logging_steps if self.args.logging_strategy == "steps" else 1
        return self.model.training and every > 1 and self._reports_now()

    def _record(self, reports: dict[str, tuple[Tensor, Tensor | int]], mode: str | None = None) -> None:
        sums = self._sums[mode or ("train" if self.model.training else "eval")]
        if self.batch_reports is not None and not self.model.training:
            pairs = {name: (float(total), float(count)) for name, (total, count) in reports.items()}
            self.batch_reports.append(pairs)
        for name, (total, count) in reports.items():
            entry = self._entry(total, count)
            for store in (sums, self._step_sums) if name in self.step_means and self.model.training else (sums,):
                store[name] = store[name] + entry if name in store else entry

    def _means(self, sums: dict[str, Float[Tensor, "2"]]) -> dict[str, float]:
        """Sum over count, over all ranks, of every report that has items."""
        names = sorted(sums)
        if not names:
            return {}
        totals = self._summed(torch.stack([sums[name] for name in names])).tolist()
        return {name: total / count for name, (total, count) in zip(names, totals, strict=True) if count}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the reports since the last log: averages over their items, counts, speed and time left."""
        # The model is still in evaluation where training ends right after one, and what it counted is to be logged.
        if self._evaluating:
            self._add_evaluation(logs)
        else:
            self._add_training(logs)
        super().log(logs, start_time)

    def _add_training(self, logs: dict[str, float]) -> None:
        sums, self._sums["train"] = self._sums["train"], {}
        counted = self._counted(sums)
        if "supervised_tokens" in counted:
            (seconds, steps), self._clock.spent = self._clock.spent, (0.0, 0)
            logs |= self._count({**counted, "training_seconds": seconds})
            logs["supervised_tokens_per_second"] = counted["supervised_tokens"] / seconds
            logs["eta_minutes"] = seconds / max(1, steps) * (self.state.max_steps - self.state.global_step) / 60
        logs.update(self._means(sums))

    def _add_evaluation(self, logs: dict[str, float]) -> None:
        sums, self._sums["eval"] = self._sums["eval"], {}
        counted = self._counted(sums)
        counted.pop("supervised_tokens", None)
        means = self._means(sums)
        if means:
            means |= counted
            means["loss"] = sum(means.pop(name) for name in list(means) if name.startswith("loss/"))
            means["perplexity"] = math.exp(min(means["ce"], 700.0))
        logs.update({f"{self._prefix}_{name}": value for name, value in means.items()})

    def _counted(self, sums: dict[str, Float[Tensor, "2"]]) -> dict[str, float]:
        """The sums over all ranks of what is counted and not averaged, taken out of the others."""
        # All ranks have the same names, so that they reduce the same tensors.
        return {name: int(self._summed(sums.pop(name)[0])) for name in self.cumulative if name in sums}

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The Trainer's evaluation, whose log has its own reports."""
        self._evaluating = True
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._evaluating = False

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The Trainer's loop; the reports of this evaluation alone are logged, under its prefix."""
        self._sums["eval"], self._prefix = {}, metric_key_prefix
        result = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if not (self.is_in_train or self.is_deepspeed_enabled or self.is_fsdp_enabled):
            # accelerate leaves a model alone that it has prepared for an evaluation: DDP would not wrap it, and the
            # ranks of a training after this would drift apart.
            self.accelerator._models = [model for model in self.accelerator._models if model is not self.model]
            self.model._is_accelerate_prepared = False
        return result
