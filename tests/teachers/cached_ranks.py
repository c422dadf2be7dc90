"""Started by torchrun in test_cached.py: trains from a cache on two gloo ranks and writes what each of them saw."""

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed

from mmkd.methods.kd import KDTrainer
from mmkd.recipe import run_teacher
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.run import build_trainer, load_rows_of
from mmkd.teachers.cached import CachedTeacher

SIZES = ["--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "2", "--max_steps", "2"]
VARIANTS: dict[str, list[str]] = {
    "taid": ["--method", "taid", "--max_steps", "2"],
    "unbiased": ["--teacher_tail", "unbiased", "--gradient_accumulation_steps", "2", "--max_steps", "2"],
    "packed": ["--packing", "true", "--dataloader_num_workers", "2", "--per_device_eval_batch_size", "3"],
}
"""Flags after the recipe. Without packing, two ranks of two rows are one rank of four."""


def results(trainer: Any) -> dict[str, Any]:
    """An evaluation of the untrained student, then losses and gradient norms of the steps."""
    evaluated = trainer.evaluate()
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "steps": [[entry["loss"], entry["grad_norm"]] for entry in history],
        "evaluated": {name: evaluated[name] for name in ("eval_loss", "eval_kl", "eval_ce")},
    }


def streamed(recipe: str) -> list[float]:
    """The losses of a run whose rows come as a stream."""
    run = recipe_of(recipe, SIZES).parse()
    assert run.arguments.teacher_cache is not None
    assert run.arguments.student is not None
    trainer: Any = KDTrainer(
        model=run.arguments.student,
        teacher=CachedTeacher(run.arguments.teacher_cache),
        args=run.training,
        train_dataset=load_rows_of(run)["train"].to_iterable_dataset(num_shards=4),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def refusals(recipe: str, other: str) -> list[str]:
    """What this rank says about teachers that cannot be: another one, and one without weights."""
    told = []
    for teacher in (other, str(Path(recipe).parent)):
        try:
            build_trainer(recipe_of(recipe, [*SIZES, "--teacher", teacher]).parse())
        except ValueError as error:
            told.append(str(error))
    return told


def main(recipe: str, other: str, output: str) -> None:
    seen: dict[str, Any] = {}
    rank, hashed, weights_sha256 = 0, [], run_teacher.weights_sha256
    run_teacher.weights_sha256 = lambda *name: hashed.append(name) or weights_sha256(*name)
    for name, flags in VARIANTS.items():
        trainer = build_trainer(recipe_of(recipe, [*SIZES, *flags]).parse())
        rank, seen[name] = trainer.args.process_index, results(trainer)
    seen["hashed"] = len(hashed)
    seen["refusals"] = refusals(recipe, other)
    seen["streamed"] = streamed(recipe)
    Path(output, f"rank{rank}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
