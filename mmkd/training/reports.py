"""What a training over tokens reports: tokens, speed, the time left and perplexity."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from mmkd.preparation.collation import BAD_ROWS
from mmkd.seams.trl_seam import HookedSFTTrainer
from mmkd.teachers.batch import Batch

from .clock import StepClock
from .counts import CountingTrainer, add
from .items import ItemLosses


class ReportingTrainer(CountingTrainer, HookedSFTTrainer):
    """trl's SFTTrainer whose logs are means over items, with counts of tokens and the time left."""

    cumulative = ("supervised_tokens", "training_seconds", "rollout_tokens", *BAD_ROWS)
    step_means: ClassVar[tuple[str, ...]] = ()
    """Reports that are also wanted once per optimizer step. Empty: nothing is reduced."""

    def _start_reports(self) -> None:
        """Called before anything can be logged."""
        self._step_sums: dict[str, Float[Tensor, 2]] = {}
        self._clock = StepClock()

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

    def _record(self, reports: dict[str, tuple[Tensor, Tensor | float]], mode: str | None = None) -> None:
        super()._record(reports, mode)
        for name in (name for name in self.step_means if name in reports and self.model.training):
            add(self._step_sums, name, self._entry(*reports[name]))

    def _means_of_step(self) -> dict[str, float]:
        """The means of the optimizer step that ends, of the reports in `step_means`."""
        sums, self._step_sums = self._step_sums, {}
        return self._means(sums)

    def _training_reports(self, sums: dict[str, Float[Tensor, "2"]]) -> dict[str, float]:
        """Averages over items, counts since the start of the run, speed and the time left."""
        report: dict[str, float] = {}
        if "rollout_tokens" in sums:
            # The tokens are counted below, where the supervised ones are.
            tokens, seconds = (self._summed(sums[name][0]).item() for name in ("rollout_tokens", "rollout_seconds"))
            del sums["rollout_seconds"]
            report["rollout_seconds"] = seconds / self.args.world_size
            report["rollout_tokens_per_second"] = tokens / max(report["rollout_seconds"], 1e-9)
        counted = self._counted(sums)
        if "supervised_tokens" in counted:
            (seconds, steps), self._clock.spent = self._clock.spent, (0.0, 0)
            report |= self._count({**counted, "training_seconds": seconds})
            report["supervised_tokens_per_second"] = counted["supervised_tokens"] / seconds
            report["eta_minutes"] = seconds / max(1, steps) * (self.state.max_steps - self.state.global_step) / 60
        return report | self._means(sums)

    def _evaluation_reports(self, sums: dict[str, Float[Tensor, "2"]]) -> dict[str, float]:
        counted = self._counted(sums)
        counted.pop("supervised_tokens", None)
        means = self._means(sums)
        if means:
            means |= counted
            means["loss"] = sum(means.pop(name) for name in list(means) if name.startswith("loss/"))
            means["perplexity"] = math.exp(min(means["ce"], 700.0))
        return means

    def _counted(self, sums: dict[str, Float[Tensor, "2"]]) -> dict[str, float]:
        """The sums over all ranks of what is counted and not averaged, taken out of the others."""
        # All ranks have the same names, so that they reduce the same tensors.
        return {name: int(self._summed(sums.pop(name)[0])) for name in self.cumulative if name in sums}


def reports_of(batch: Batch, losses: ItemLosses, evaluated: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """The reports that do not depend on the method; of an evaluation the losses too, by the counts of their items."""
    reports: dict[str, Any] = {"supervised_tokens": (batch.student.supervised.sum(), 1)}
    if evaluated is not None:
        reports |= {f"loss/{kind}": (total, evaluated[kind]) for kind, total in losses.totals.items()}
    if batch.skipped is not None:
        reports |= {name: (count, 1) for name, count in zip(BAD_ROWS, batch.skipped, strict=True)}
    return reports
