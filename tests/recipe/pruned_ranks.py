"""Started by test_pruning.py: builds pruned students on gloo ranks, trains them, and writes what each rank saw."""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

import mmkd.recipe.run_pruning as run_pruning
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.run import build_trainer
from tests.trainers.two_ranks import zero

SHARDS = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


def main(recipe: str, output: str, jobs: str) -> None:
    """Runs the jobs (name -> flags, and how the training is spread, as JSON)."""
    saw: dict[str, Any] = {}
    for name, (how, flags) in json.loads(jobs).items():
        # As accelerate's launcher says it, and not to the jobs that come after.
        for variable, value in SHARDS.items():
            os.environ.pop(variable, None)
            if how == "fsdp2":
                os.environ[variable] = value
        keys = {"output_dir": f"{output}/{name}"}
        if how.startswith("zero"):
            path = Path(output, f"{name}-{os.environ['RANK']}.json")
            path.write_text(json.dumps(zero(int(how[-1]))))
            keys["deepspeed"] = str(path)
        measured = []
        calibrate = run_pruning.calibration_batches
        run_pruning.calibration_batches = lambda *words, calls=measured, own=calibrate: calls.append(1) or own(*words)
        trainer = build_trainer(recipe_of(recipe, flags).with_(**keys).parse())
        run_pruning.calibration_batches = calibrate
        digest = hashlib.sha256()
        for parameter in trainer.model.parameters():
            digest.update(parameter.detach().float().numpy().tobytes())
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        saw[name] = {"measured": len(measured), "weights": digest.hexdigest(), "losses": losses}
    Path(output, f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(saw))


if __name__ == "__main__":
    main(*sys.argv[1:])
