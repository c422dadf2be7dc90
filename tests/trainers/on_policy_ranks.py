"""Started by torchrun in test_on_policy.py: trains on answers of the student on two gloo ranks, once per job."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig

from mmkd.methods.kd import KDConfig, KDTrainer
from scripts.make_tiny_models import sentences
from tests.helpers import LORA
from tests.trainers.two_ranks import wrapping

NAMES = ("loss", "grad_norm", "rollouts_truncated", "rollout_length", "rollout_tokens")


def train(models: str, output: str, how: str, server: str = "", lora: bool = False, **settings: Any) -> list[Any]:
    """What a training spread over ranks in a way logs, step by step."""
    data = Dataset.from_dict({"prompt": sentences(24, seed=3), "completion": [f" {s}" for s in sentences(24, seed=4)]})
    defaults: dict[str, Any] = {
        "output_dir": f"{output}/run",
        "max_steps": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_length": 64,
        "on_policy_fraction": 0.5,
        "rollout_max_tokens": 8,
        "rollout_temperature": 0.0,
        "rollout_server": [server] if server else None,
    }
    # accelerate says this to the trainings that come after, which would shard too.
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    spread = wrapping(how)
    if "deepspeed" in spread:
        # The Trainer's learning rate, and not the weight decay that the optimizer has unless told otherwise.
        spread["deepspeed"]["optimizer"]["params"] |= {"lr": "auto", "weight_decay": 0.0}
    config = KDConfig(**{**defaults, **spread, **settings})
    # An adapter starts with random weights.
    torch.manual_seed(0)
    adapter = LoraConfig(**LORA) if lora else None
    student, teacher = f"{models}/student", f"{models}/teacher"
    trainer = KDTrainer(model=student, teacher=teacher, args=config, train_dataset=data, peft_config=adapter)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return [[entry[name] for name in NAMES] for entry in history]


def main(models: str, output: str, jobs: str) -> None:
    """Trains the jobs (name -> arguments of `train`, as JSON) and writes what each rank saw."""
    results = {name: train(models, f"{output}/{name}", **job) for name, job in json.loads(jobs).items()}
    Path(output, f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
