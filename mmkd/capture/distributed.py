"""The same pass on Ray Data: shards go to workers, each with a teacher of its own; this process writes."""

import logging
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch

from mmkd.errors import UserError

from .build_plan import Plan, ShardResult

# A machine may be taken away once without harm.
_TRIES = 2


def shards_on_ray(plan: Plan, missing: list[tuple[str, int]]) -> Iterator[ShardResult]:
    """The shards in the order in which workers finish them.

    Joins the cluster of RAY_ADDRESS, or starts Ray on this machine. Workers read the data from the paths of this
    machine, so that a cluster needs a shared file system. Raises UserError as the shards themselves do.
    """
    try:
        import ray
        import ray.data
        from ray.exceptions import RayActorError
    except ImportError as error:
        raise UserError("engine: ray needs Ray; install it with `pip install 'mmkd[ray]'`.") from error
    arguments = plan.arguments
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    try:
        _check_gpus(plan, ray.cluster_resources())
        ray.data.DataContext.get_current().enable_progress_bars = False
        shards = ray.data.from_items(
            [{"split": split, "number": number} for split, number in missing], override_num_blocks=len(missing)
        )
        results = shards.map(
            cast(Any, _Worker),
            fn_constructor_args=(ray.put(plan), torch.get_num_threads()),
            concurrency=min(arguments.cache_workers, len(missing)),
            num_cpus=arguments.cache_worker_cpus,
            num_gpus=arguments.cache_worker_gpus,
            # Ray would try a shard for ever, and a worker that lacks memory dies of it each time.
            max_task_retries=_TRIES - 1,
        )
        for row in _explained(results.iter_rows(), RayActorError):
            outcome = pickle.loads(row["result"])
            if isinstance(outcome, ValueError):
                raise UserError(str(outcome), because=outcome.because if isinstance(outcome, UserError) else None)
            yield outcome
    finally:
        if started:
            ray.shutdown()


def _check_gpus(plan: Plan, resources: Mapping[str, float]) -> None:
    """Raises UserError where all workers would take the first GPU: Ray hides none from those that asked for none."""
    if not resources.get("GPU") or plan.arguments.cache_worker_gpus:
        return
    settings = plan.run.arguments
    if settings.teacher_server is None and settings.teacher_api is None:
        raise UserError(
            "cache_worker_gpus is 0, so that all Ray workers would load their teacher onto the first GPU. Set "
            "cache_worker_gpus: 1, or a share of one where several teachers fit.",
            because="meaning",
        )


def _explained(rows: Iterable[Any], died: type[Exception]) -> Iterator[Any]:
    """Turns the death of a worker, whose own output stays on its machine, into a ValueError that says what to do."""
    try:
        yield from rows
    except died as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"Ray workers died {_TRIES} times over one shard: {reason} Most often memory did not suffice: lower "
            "cache_workers or cache_batch_tokens, or reserve more with cache_worker_cpus or cache_worker_gpus. What "
            "was finished is kept, and the same command goes on from there."
        ) from error


class _Worker:
    """Answers for single shards; loads its teacher at the first."""

    def __init__(self, plan: Any, threads: int):
        import ray

        # Sums over several threads differ in their last bits; every worker adds like the process that started it.
        torch.set_num_threads(threads)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.plan: Plan = ray.get(plan)

    def __call__(self, shard: dict[str, Any]) -> dict[str, bytes]:
        # Ray wraps what a worker raises until its message is hard to find; bad input should read as it does elsewhere.
        try:
            outcome = self.plan.shard(str(shard["split"]), int(shard["number"]), lambda tokens: None)
        except ValueError as error:
            outcome = error
        return {"result": pickle.dumps(outcome)}
