"""The progress line: what a distillation run shows beside trl's bar."""

from typing import Any

from transformers import Trainer
from transformers.trainer_callback import ProgressCallback

# Name in the logs -> name in the line, which has little room.
_SHOWN = {
    "loss": "loss",
    "kl": "kl",
    "top1_agreement": "agree",
    "taid_t": "t",
    "supervised_tokens_per_second": "tok/s",
}


def show_progress(trainer: Trainer) -> None:
    """Puts the line in the place of the Trainer's own, where that is shown."""
    if any(isinstance(callback, ProgressCallback) for callback in trainer.callback_handler.callbacks):
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(DistillationProgress)


class DistillationProgress(ProgressCallback):
    """The Trainer's bar (steps, elapsed, time left) with loss, KL to the teacher, top-1 agreement and tokens/s."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Refreshes the line, then prints the whole record above it."""
        if self.training_bar is not None and logs is not None:
            shown = {short: f"{logs[name]:.4g}" for name, short in _SHOWN.items() if name in logs}
            if shown:
                self.training_bar.set_postfix(shown)
        super().on_log(args, state, control, logs, **kwargs)
