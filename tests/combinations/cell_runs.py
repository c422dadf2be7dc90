"""Trains recipes of cells, here or, started by torchrun, on two gloo ranks, and says what became of each."""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mmkd.errors import UserError
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.run import build_trainer
from tests.helpers import environment

_ROOT = Path(__file__).parents[2]
_PRESETS = _ROOT / "mmkd" / "commands" / "_presets"
_ACCELERATE = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--mixed_precision", "no", "--config_file"]
_LAUNCHERS = {
    "DDP": [*_ACCELERATE, str(_PRESETS / "ddp.yaml")],
    "FSDP2": [*_ACCELERATE, str(_PRESETS / "fsdp2.yaml")],
    # accelerate starts DeepSpeed on GPUs only.
    "ZeRO-3": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
}
# The loss of sft does not depend on its teacher, while what it reports does.
_COMPARED = ("loss", "grad_norm", "kl", "chunk_kl")


def outcome(recipe: str | Path) -> dict[str, Any]:
    """What every step and evaluation of a run logged, or the error that it ended with."""
    trainer: Any = None
    try:
        trainer = build_trainer(recipe_of(str(recipe)).parse())
        trainer.train()
    except UserError as error:
        return {"refused": str(error), "because": error.because, "began": trainer is not None}
    except Exception:
        return {"error": traceback.format_exc(), "began": trainer is not None}
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return {"steps": [[entry[name] for name in _COMPARED if name in entry] for entry in logged], "eval": evaluated}


def on_two_ranks(recipes: Mapping[str, Path], ranks: str, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What became of each recipe on each of two ranks, trained one after the other by the same processes."""
    folder.mkdir(parents=True)
    (folder / "recipes.json").write_text(json.dumps({name: str(path) for name, path in recipes.items()}))
    command = [sys.executable, *_LAUNCHERS[ranks], "--module", "tests.combinations.cell_runs", str(folder), ranks]
    variables = {**environment(), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, timeout=800, cwd=_ROOT, env=variables, capture_output=True, text=True)
    outcomes = [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]
    failed = {name: ended for rank in outcomes for name, ended in rank.items() if ended.get("began")}
    assert done.returncode == 0, failed or done.stderr[-3000:]
    return {name: [rank[name] for rank in outcomes] for name in recipes}


def main(folder: str, ranks: str) -> None:
    """Trains the recipes of a folder's recipes.json (name -> path)."""
    torch.set_num_threads(1)
    if ranks == "ZeRO-3":
        import deepspeed  # pyright: ignore[reportMissingImports]

        deepspeed.init_distributed("gloo")
    outcomes = {}
    for name, recipe in json.loads(Path(folder, "recipes.json").read_text()).items():
        outcomes[name] = outcome(recipe)
        Path(folder, f"rank{os.environ['RANK']}.json").write_text(json.dumps(outcomes))
        if outcomes[name].get("began"):
            # The other rank may wait for this one.
            sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
