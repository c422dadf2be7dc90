"""Ctrl-C ends a run after its current step, with a checkpoint, instead of somewhere in the middle of a write."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.trainer_callback import TrainerCallback
from transformers.trainer_utils import SaveStrategy


class InterruptCallback(TrainerCallback):
    """Stops training after the step in which `asked` became True; saves there where the run saves at all."""

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the run if that was asked for."""
        if self.asked:
            control.should_training_stop = True
            control.should_save = args.save_strategy != SaveStrategy.NO

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the first SIGINT as the wish to stop; a second one raises KeyboardInterrupt as usual."""

        def ask(signum: int, frame: Any) -> None:
            self.asked = True
            signal.signal(signal.SIGINT, before)
            print("\nStopping after this step; press Ctrl-C again to stop at once.", file=sys.stderr)

        before = signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
