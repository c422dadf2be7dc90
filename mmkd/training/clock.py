"""How long training takes, without what happens between its steps."""

import time
from typing import Any

from transformers.trainer_callback import TrainerCallback


class StepClock(TrainerCallback):
    """Adds up what training takes, until `spent` is set anew.

    A step lasts from the request for its batches until the optimizer has moved, so that loading data, answers of the
    student, the teacher and the optimizer count, and evaluation, saving and logging do not.
    """

    def __init__(self) -> None:
        self._began: float | None = None
        self.spent = (0.0, 0)
        """Seconds and optimizer steps."""

    def begin(self) -> None:
        """Called when the batches of a step are asked for."""
        self._began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds the step that ends."""
        if self._began is not None:
            seconds, steps = self.spent
            self.spent, self._began = (seconds + time.monotonic() - self._began, steps + 1), None
