"""What a run reports: sums over ranks and steps behind every mean, speed and the time left."""

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from trl.trainer.sft_trainer import SFTTrainer

from .vision import BAD_ROWS


class ReportingTrainer(SFTTrainer):
    """trl's SFTTrainer whose logs are means over the items of all ranks since the last log."""

    # transformers types it as a union with None, for trainers that are still without it.
    model: Any

    step_means: ClassVar[tuple[str, ...]] = ()
    """Reports that are also wanted once per optimizer step. Empty: nothing is reduced."""

    def _start_reports(self) -> None:
        """Called before anything can be logged."""
        self._sums: dict[str, dict[str, Float[Tensor, 2]]] = {"train": {}, "eval": {}}
        self._step_sums: dict[str, Float[Tensor, 2]] = {}
        self._prefix = "eval"
        # Set to a list, it gets the reports of every batch of an evaluation, for who wants to resample them.
        self.batch_reports: list[dict[str, tuple[float, float]]] | None = None
        # Seconds and optimizer steps of training since the last log, evaluation and saving left out.
        self._spent = (0.0, 0)

    def _reports_now(self) -> bool:
        """Whether this micro-batch computes diagnostics: always in evaluation, else in the steps that are logged."""
        if not self.model.training or self.args.logging_strategy != "steps":
            return not self.model.training or self.args.logging_strategy != "no"
        step = self.state.global_step + 1
        return step % max(1, int(self.state.logging_steps)) == 0 or (step == 1 and self.args.logging_first_step)

    def _record(self, reports: dict[str, tuple[Tensor, Tensor | int]], mode: str | None = None) -> None:
        sums = self._sums[mode or ("train" if self.model.training else "eval")]
        if self.batch_reports is not None and not self.model.training:
            pairs = {name: (float(total), float(count)) for name, (total, count) in reports.items()}
            self.batch_reports.append(pairs)
        for name, (total, count) in reports.items():
            dtype = torch.float32 if total.device.type == "mps" else torch.float64
            entry = torch.stack([total.detach().to(dtype), torch.as_tensor(count, dtype=dtype, device=total.device)])
            for store in (sums, self._step_sums) if name in self.step_means and self.model.training else (sums,):
                store[name] = store[name] + entry if name in store else entry

    def _means(self, sums: dict[str, Float[Tensor, "2"]]) -> dict[str, float]:
        """Sum over count, over all ranks, of every report that has items."""
        names = sorted(sums)
        if not names:
            return {}
        totals = self._summed(torch.stack([sums[name] for name in names])).tolist()
        return {name: total / count for name, (total, count) in zip(names, totals, strict=True) if count}

    def _summed(self, tensor: Tensor) -> Tensor:
        total = self.accelerator.reduce(tensor, reduction="sum")
        assert isinstance(total, Tensor)
        return total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the reports since the last log: averages over their items, speed and time left."""
        training = self.model.training
        mode = "train" if training else "eval"
        tokens = self._sums[mode].pop("supervised_tokens", None)
        # All ranks have the same names, so that they reduce the same tensors.
        counted = {name: self._summed(self._sums[mode].pop(name)[0]) for name in BAD_ROWS if name in self._sums[mode]}
        means = self._means(self._sums[mode])
        self._sums[mode] = {}
        if training and tokens is not None:
            tokens_seen = self._summed(tokens[0]).item()
            (seconds, steps), self._spent = self._spent, (0.0, 0)
            before = next((entry for entry in reversed(self.state.log_history) if "supervised_tokens" in entry), {})
            logs["supervised_tokens"] = before.get("supervised_tokens", 0) + int(tokens_seen)
            logs |= {name: before.get(name, 0) + int(count) for name, count in counted.items()}
            logs["supervised_tokens_per_second"] = tokens_seen / seconds
            logs["eta_minutes"] = seconds / max(1, steps) * (self.state.max_steps - self.state.global_step) / 60
        if not training and means:
            means |= {name: int(count) for name, count in counted.items()}
            means["loss"] = sum(means.pop(name) for name in list(means) if name.startswith("loss/"))
            means["perplexity"] = math.exp(min(means["ce"], 700.0))
        logs.update(means if training else {f"{self._prefix}_{name}": value for name, value in means.items()})
        super().log(logs, start_time)

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
