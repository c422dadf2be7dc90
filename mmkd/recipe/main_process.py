"""What one process computes for all."""

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list

from mmkd.training.config import DistillationConfig

Result = TypeVar("Result")


def from_main_process(args: DistillationConfig, compute: Callable[[], Result]) -> Result:
    """What `compute` gives on the main process, on every rank; every rank raises the ValueError that it raises."""
    if args.world_size == 1:
        return compute()
    results: list[Any] = [None]
    if args.process_index == 0:
        try:
            results = [compute()]
        except ValueError as error:
            # The others would wait for an answer until they time out.
            results = [error]
    (result,) = broadcast_object_list(results)
    if isinstance(result, ValueError):
        raise result
    return result
