"""Started by torchrun in test_on_policy.py: trains on answers of the student on two gloo ranks."""

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset

from mmkd.methods.kd import KDConfig, KDTrainer
from scripts.make_tiny_models import sentences


def main(models: str, output: str, *servers: str) -> None:
    data = Dataset.from_dict({"prompt": sentences(24, seed=3), "completion": [f" {s}" for s in sentences(24, seed=4)]})
    sharding: dict[str, Any] = {"fsdp": True} if servers else {}
    config = KDConfig(
        output_dir=f"{output}/run",
        max_steps=4,
        learning_rate=1e-2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        logging_steps=1,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_length=64,
        on_policy_fraction=0.5,
        rollout_max_tokens=8,
        rollout_temperature=0.0,
        # With servers the student is sharded.
        rollout_server=list(servers) or None,
        **sharding,
    )
    trainer = KDTrainer(model=f"{models}/student", teacher=f"{models}/teacher", args=config, train_dataset=data)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    names = ("loss", "grad_norm", "rollouts_truncated", "rollout_length", "rollout_tokens")
    result = [[entry[name] for name in names] for entry in history]
    Path(output, f"rank{trainer.args.process_index}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
