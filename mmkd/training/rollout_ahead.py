"""Rollouts of the next accumulated batch, by servers, while this one trains."""

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from itertools import islice
from typing import Any

from accelerate.utils import gather_object

from mmkd.teachers.batch import Batch

from .answers import Rollout
from .rollouts import Asked, Mixed, Read, RolloutPrompt, Rollouts

logger = logging.getLogger(__name__)

Answers = tuple[Mixed, list[Batch] | None]
"""What became of rows, and where the teacher was asked too the micro-batches with what it said."""


class RolloutsAhead:
    """The next accumulated batch, collected and answered while this one trains: its answers are one step old.

    The first batch of a training and of an epoch is answered before it is learnt from. Weights are handed over between
    two steps only, and never while answers are under way. A checkpoint holds the answers to the batch after it, so
    that a resumed run goes on with them.

    Args:
        rollouts: whose answers they are.
        ask: adds to a micro-batch what its teacher says, where that can be asked beside a step.
    """

    def __init__(self, rollouts: Rollouts, ask: Callable[[Batch], Batch] | None = None):
        self.rollouts, self.ask = rollouts, ask
        self._saved: list[dict[str, Any] | None] = []
        self._forget()

    def start_over(self) -> None:
        """Nothing is under way: a training begins."""
        self._drop()
        self._saved = []

    def held(self, iterator: Iterator[Batch]) -> list[Batch]:
        """The batches that were taken from this iterator already, for the step that comes."""
        if self._asked is None or self._iterator is not iterator:
            self._drop()
            return []
        return list(self._asked.batches)

    def mix(self, batches: list[Batch], step: int, read: Read) -> tuple[list[Batch], Mixed]:
        """As `Rollouts.mix`; with answers that were asked for one step before, where there are such."""
        asked, answers = self._asked, self._answers
        if asked is not None and answers is not None and [*map(id, asked.batches)] == [*map(id, batches)]:
            self._forget()
            mixed, answered = answers.result()
            return self.rollouts.put(asked, mixed, read) if answered is None else (answered, mixed)
        self._drop()
        saved, self._saved = self._saved, []
        if saved:
            asked = self.rollouts.ask(batches, step)
            rollouts = self._recalled(asked, saved)
            if rollouts is not None:
                return self.rollouts.put(asked, Mixed(asked.prompts, rollouts, 0.0, staleness=1), read)
        return self.rollouts.mix(batches, step, read)

    def begin(self, iterator: Iterator[Batch], count: int, step: int) -> None:
        """Has the servers answer the next so many batches, for a step, with the student as it is now."""
        batches = list(islice(iterator, count))
        if not batches:
            return
        self.rollouts.hand_over()
        self._iterator, self._asked = iterator, self.rollouts.ask(batches, step)
        self._answers = _in_background(self._answered, self._asked)

    def state(self) -> dict[str, Any]:
        """What a checkpoint is to hold, as JSON can say it: the answers of every rank; all of them must ask."""
        own = None
        # An error comes up in the step that wants the answers.
        if self._asked is not None and self._answers is not None and self._answers.exception() is None:
            answers = [list(rollout) for rollout in self._answers.result()[0].rollouts]
            own = {"step": self._asked.step, "prompts": _digest(self._asked.prompts), "answers": answers}
        return {"ranks": gather_object([own])}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from the state of a checkpoint."""
        self._saved = state["ranks"] if any(state["ranks"]) else []

    def _recalled(self, asked: Asked, saved: list[dict[str, Any] | None]) -> list[Rollout] | None:
        """The answers of a checkpoint to these prompts; None where it has others."""
        own = saved[self.rollouts.rank] if len(saved) == self.rollouts.ranks else None
        same = own is not None and (own["step"], own["prompts"]) == (asked.step, _digest(asked.prompts))
        # All ranks take the same way, since handing weights over is for all of them together.
        if not all(gather_object([same])):
            logger.warning(
                "The checkpoint holds answers to other prompts than those of its next step: data, seed or the number "
                "of processes are others. The student answers them anew."
            )
            return None
        assert own is not None
        return [Rollout(*answer) for answer in own["answers"]]

    def _answered(self, asked: Asked) -> Answers:
        begun = time.monotonic()
        rollouts = self.rollouts.answer(asked)
        mixed = Mixed(asked.prompts, rollouts, time.monotonic() - begun, staleness=1)
        if self.ask is None:
            return mixed, None
        batches, _ = self.rollouts.put(asked, mixed)
        return mixed, [self.ask(batch) for batch in batches]

    def _drop(self) -> None:
        """Forgets what is under way, once it is not any more."""
        if self._answers is not None:
            self._answers.exception()
        self._forget()

    def _forget(self) -> None:
        self._iterator: Iterator[Batch] | None = None
        self._asked: Asked | None = None
        self._answers: Future[Answers] | None = None


def _digest(prompts: Iterable[RolloutPrompt]) -> str:
    told = repr([(prompt.batch, prompt.row, prompt.start, prompt.ids) for prompt in prompts])
    return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()


def _in_background(work: Callable[[Asked], Answers], asked: Asked) -> Future[Answers]:
    """What `work` makes of something, in a thread that ends with the process."""
    future: Future[Answers] = Future()

    def run() -> None:
        try:
            future.set_result(work(asked))
        except BaseException as error:
            # It belongs to the step that wants the answers, which would wait for ever without it.
            future.set_exception(error)

    threading.Thread(target=run, name="mmkd-rollouts", daemon=True).start()
    return future
