"""Counts and means that belong to the checkpoint: a resumed run goes on from what was there, logged or not."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Trainer

_STATE = "MmkdCounts"
"""Where in the trainer state of a checkpoint the counts are."""


class CountingTrainer(Trainer):
    """transformers' Trainer whose checkpoints hold everything that a log after them has to know.

    The Trainer forgets in a resumed run what it had seen since the last log before the checkpoint: its loss there is
    the mean of fewer steps, and a count of tokens lacks some.
    """

    cumulative: ClassVar[tuple[str, ...]] = ()
    """Reports that are sums since the start of the run, in a log; a checkpoint has them up to its own step."""

    # transformers types it as a union with None, for trainers that are still without it.
    model: Any

    _totals: dict[str, float]
    """What the logs of the run have counted so far, over all ranks and the sessions before this one."""
    _resumed: dict[str, Any] | None = None

    def _unlogged(self) -> dict[str, Tensor]:
        """Report -> (sum, number of items) of this rank since the last log; may be written to."""
        raise NotImplementedError

    def _spent_unlogged(self, spent: tuple[float, int] | None = None) -> tuple[float, int]:
        """Seconds and optimizer steps since the last log, set to what is given."""
        return (0.0, 0)

    @staticmethod
    def _entry(total: Tensor, count: Tensor | int) -> Tensor:
        """Sum and number of items in one tensor, in the widest type that the device has."""
        dtype = _wide(total.device)
        return torch.stack([total.detach().to(dtype), torch.as_tensor(count, dtype=dtype, device=total.device)])

    def _summed(self, tensor: Tensor) -> Tensor:
        total = self.accelerator.reduce(tensor, reduction="sum")
        assert isinstance(total, Tensor)
        return total

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
        found = {name: value for entry in logged if "eval_runtime" in entry for name, value in entry.items()}
        return {name: value for name, value in found.items() if name != "step"} or None

    # Private places of the Trainer: a public hook between its reset of what it has logged and the first step, or
    # between the last log and what is written, would do instead.

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer's, with what was counted and not logged yet. All ranks come here."""
        sums = self._unlogged()
        names = sorted(sums)
        summed = self._summed(torch.stack([sums[name] for name in names])).tolist() if names else []
        unlogged: Any = self._tr_loss
        state = {
            "totals": self._totals,
            "sums": dict(zip(names, summed, strict=True)),
            "spent": list(self._spent_unlogged()),
            "loss": self._summed(unlogged.detach()).item() / self.args.world_size,
            "logged_step": self._globalstep_last_logged,
        }
        # As that of a callback, which is how the state of a checkpoint can be extended.
        callbacks: Any = self.state.stateful_callbacks
        callbacks[_STATE] = {"args": {}, "attributes": state}
        super()._save_checkpoint(model, trial)
        del callbacks[_STATE]

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, at the start of every training: nothing is counted, or what the checkpoint had counted."""
        self._totals, self._resumed = {}, None
        self._unlogged().clear()
        self._spent_unlogged((0.0, 0))
        return super()._init_training_state(*args, **kwargs)

    def _load_callback_state(self) -> None:
        """The Trainer's, with the counts of the checkpoint; one of an earlier version of mmkd has what it logged."""
        callbacks: Any = self.state.stateful_callbacks
        # Taken out before the Trainer looks for a callback of this name.
        found = callbacks.pop(_STATE, {"attributes": None})["attributes"]
        super()._load_callback_state()
        if found is None:
            entries = [entry for entry in self.state.log_history if "loss" in entry or "train_runtime" in entry]
            self._totals = {name: entry[name] for entry in entries for name in self.cumulative if name in entry}
            return
        self._totals, self._resumed = dict(found["totals"]), found
        self._spent_unlogged((found["spent"][0], int(found["spent"][1])))
        sums, device = self._unlogged(), self.accelerator.device
        for name, pair in found["sums"].items():
            entry = torch.tensor(pair, dtype=_wide(device), device=device)
            # They are those of all ranks together; the others only have the same names.
            sums[name] = entry if self.is_world_process_zero() else torch.zeros_like(entry)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's; before the first one of a resumed run, its loss since the last log is what it was."""
        if self._resumed is not None:
            self._tr_loss += self._resumed["loss"]
            # The mean loss that training returns is that of its own steps.
            self._total_loss_scalar -= self._resumed["loss"]
            self._globalstep_last_logged = self._resumed["logged_step"]
            self._resumed = None
        return super().training_step(*args, **kwargs)


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
