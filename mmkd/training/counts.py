"""Sums over ranks and steps behind every mean that is logged; a resumed run goes on from those of its checkpoint."""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mmkd.seams.accelerate_seam import forget_prepared
from mmkd.seams.trainer_seam import HookedTrainer


class CountingTrainer(HookedTrainer):
    """transformers' Trainer whose logs are means over the items of all ranks since the last log.

    Its checkpoints hold everything that a log after them has to know. The Trainer forgets in a resumed run what it had
    seen since the last log before the checkpoint: its loss there is the mean of fewer steps, and a count of tokens
    lacks some.
    """

    state_name = "MmkdCounts"
    cumulative: ClassVar[tuple[str, ...]] = ()
    """Reports that are sums since the start of the run, in a log; a checkpoint has them up to its own step."""

    # transformers types it as a union with None, for trainers that are still without it.
    model: Any

    _totals: dict[str, float]
    """What the logs of the run have counted so far, over all ranks and the sessions before this one."""
    _resumed: dict[str, Any] | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        self._sums: dict[str, dict[str, Float[Tensor, 2]]] = {"train": {}, "eval": {}}
        self._prefix = "eval"
        # Set to a list, it gets the reports of every batch of an evaluation, for who wants to resample them.
        self.batch_reports: list[dict[str, tuple[float, float]]] | None = None
        self._totals = {}
        self._evaluating = False
        super().__init__(*args, **kwargs)

    def _unlogged(self) -> dict[str, Float[Tensor, "2"]]:
        """Report -> (sum, number of items) of this rank since the last log; may be written to."""
        return self._sums["train"]

    def _spent_unlogged(self, spent: tuple[float, int] | None = None) -> tuple[float, int]:
        """Seconds and optimizer steps since the last log, set to what is given."""
        return (0.0, 0)

    @staticmethod
    def _entry(total: Tensor, count: Tensor | float) -> Tensor:
        """Sum and number of items in one tensor, in the widest type that the device has."""
        dtype = _wide(total.device)
        return torch.stack([total.detach().to(dtype), torch.as_tensor(count, dtype=dtype, device=total.device)])

    def _summed(self, tensor: Tensor) -> Tensor:
        total = self.accelerator.reduce(tensor, reduction="sum")
        assert isinstance(total, Tensor)
        return total

    def _record(self, reports: dict[str, tuple[Tensor, Tensor | float]], mode: str | None = None) -> None:
        """Adds a micro-batch's reports, each a sum and the number of its items, to those of this rank."""
        mode = mode or ("train" if self.model.training else "eval")
        if self.batch_reports is not None and not self.model.training:
            pairs = {name: (float(total), float(count)) for name, (total, count) in reports.items()}
            self.batch_reports.append(pairs)
        for name, (total, count) in reports.items():
            add(self._sums[mode], name, self._entry(total, count))

    def _means(self, sums: dict[str, Float[Tensor, "2"]]) -> dict[str, float]:
        """Sum over count, over all ranks, of every report that has items."""
        names = sorted(sums)
        if not names:
            return {}
        totals = self._summed(torch.stack([sums[name] for name in names])).tolist()
        return {name: total / count for name, (total, count) in zip(names, totals, strict=True) if count}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the reports since the last log, or of the evaluation that is going on."""
        # The model is still in evaluation where training ends right after one, and what it counted is to be logged.
        mode = "eval" if self._evaluating else "train"
        sums, self._sums[mode] = self._sums[mode], {}
        if self._evaluating:
            reports = self._evaluation_reports(sums)
            logs.update({f"{self._prefix}_{name}": value for name, value in reports.items()})
        else:
            logs.update(self._training_reports(sums))
        super().log(logs, start_time)

    def _training_reports(self, sums: dict[str, Float[Tensor, "2"]]) -> dict[str, float]:
        """What a log says besides the Trainer's own, of the reports since the one before."""
        return self._means(sums)

    def _evaluation_reports(self, sums: dict[str, Float[Tensor, "2"]]) -> dict[str, float]:
        """What an evaluation says besides the Trainer's own, without its prefix."""
        return self._means(sums)

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
            forget_prepared(self.accelerator, self.model)
        return result

    def _count(self, counted: dict[str, float]) -> dict[str, float]:
        """Everything counted since the start of the run, with what came since the last log."""
        for name, count in counted.items():
            self._totals[name] = self._totals.get(name, 0) + count
        return self._totals

    def last_evaluation(self) -> dict[str, float] | None:
        """What training's own evaluation said of the student as it is now; None where there was none of it."""
        state, best = self.state, self.args.load_best_model_at_end
        if best and state.best_global_step not in (None, state.global_step):
            # Another student than that of the last step.
            return None
        logged = [entry for entry in state.log_history if entry["step"] == state.global_step]
        metrics = {name: value for entry in logged if "eval_runtime" in entry for name, value in entry.items()}
        return {name: value for name, value in metrics.items() if name != "step"} or None

    def state_to_save(self) -> dict[str, Any]:
        """What was counted and not logged yet, over all ranks."""
        sums = self._unlogged()
        names = sorted(sums)
        summed = self._summed(torch.stack([sums[name] for name in names])).tolist() if names else []
        loss, logged_step = self.unlogged
        return {
            "totals": self._totals,
            "sums": dict(zip(names, summed, strict=True)),
            "spent": list(self._spent_unlogged()),
            "loss": self._summed(loss).item() / self.args.world_size,
            "logged_step": logged_step,
        }

    def training_starts(self) -> None:
        """Nothing is counted yet, or what the checkpoint had counted."""
        super().training_starts()
        self._totals, self._resumed = {}, None
        self._unlogged().clear()
        self._spent_unlogged((0.0, 0))

    def state_restored(self, state: dict[str, Any] | None) -> None:
        """Goes on from the counts of the checkpoint; one of an earlier version of mmkd has what it logged."""
        super().state_restored(state)
        if state is None:
            entries = [entry for entry in self.state.log_history if "loss" in entry or "train_runtime" in entry]
            self._totals = {name: entry[name] for entry in entries for name in self.cumulative if name in entry}
            return
        self._totals, self._resumed = dict(state["totals"]), state
        self._spent_unlogged((state["spent"][0], int(state["spent"][1])))
        sums, device = self._unlogged(), self.accelerator.device
        for name, pair in state["sums"].items():
            entry = torch.tensor(pair, dtype=_wide(device), device=device)
            # They are those of all ranks together; the others only have the same names.
            sums[name] = entry if self.is_world_process_zero() else torch.zeros_like(entry)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's; before the first one of a resumed run, its loss since the last log is what it was."""
        if self._resumed is not None:
            self.restore_unlogged(self._resumed["loss"], self._resumed["logged_step"])
            self._resumed = None
        return super().training_step(*args, **kwargs)


def add(sums: dict[str, Float[Tensor, "2"]], name: str, entry: Float[Tensor, "2"]) -> None:
    """Adds a sum and its number of items to those of a report."""
    sums[name] = sums[name] + entry if name in sums else entry


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
