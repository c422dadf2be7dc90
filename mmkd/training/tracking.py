"""Trackers of a run: open until everything is logged, and closed before the next run begins."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer

from mmkd.seams.transformers_seam import tracker_classes


@contextmanager
def trackers_open(trainer: Trainer) -> Iterator[None]:
    """In it, trackers outlast the training.

    The Trainer closes them when training ends. What is logged after that, such as the evaluation of the saved student,
    would begin a second run there (MLflow, Trackio).
    """
    ends: list[Any] = []
    classes = tracker_classes()
    trackers: list[Any] = [
        callback for callback in trainer.callback_handler.callbacks if isinstance(callback, tuple(classes.values()))
    ]
    for tracker in trackers:
        tracker.on_train_end = _later(tracker.on_train_end, ends)
    try:
        yield
    finally:
        for tracker in trackers:
            del tracker.on_train_end
        for end in ends:
            end()
        if any(isinstance(tracker, classes["wandb"]) for tracker in trackers):
            _end_wandb()


def _later(end: Any, ends: list[Any]) -> Any:
    return lambda *args, **kwargs: ends.append(lambda: end(*args, **kwargs))


def _end_wandb() -> None:
    """Its callback leaves the run open, and the next stage of the process would log into it."""
    import wandb

    wandb.finish()
