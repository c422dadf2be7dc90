"""Started by torchrun in test_base.py: trains the tiny models on two gloo ranks and writes what each rank saw."""

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset

from mmkd.trainers import METHODS
from scripts.make_tiny_models import sentences
from tests.vlms import vision_rows


def zero(stage: int) -> dict[str, Any]:
    """A DeepSpeed configuration that runs without a GPU."""
    import deepspeed  # pyright: ignore[reportMissingImports]

    deepspeed.init_distributed("gloo")
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    optimizer = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
    automatic = dict.fromkeys(sizes, "auto")
    return {
        "zero_optimization": {"stage": stage},
        "optimizer": optimizer,
        "zero_force_ds_cpu_optimizer": False,
        **automatic,
    }


def main(method: str, models: str, output: str, stage: str = "") -> None:
    cls = METHODS[method]
    data = Dataset.from_dict({"prompt": sentences(24, seed=3), "completion": [f" {s}" for s in sentences(24, seed=4)]})
    if method == "llava_kd":
        data = vision_rows([1, 2, 0, 3] * 6)
    config = cls.config_class(
        output_dir=f"{output}/run",
        max_steps=4,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        logging_steps=1,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_length=128,
        assistant_only_loss=method == "llava_kd",
        deepspeed=zero(int(stage)) if stage else None,
    )
    trainer = cls(
        model=f"{models}/student",
        teacher=f"{models}/teacher",
        args=config,
        train_dataset=data,
    )
    trainer.train()
    evaluated = trainer.evaluate(eval_dataset=data.select(range(5)))
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    result = {
        "steps": [[entry["loss"], entry["grad_norm"]] for entry in history],
        "kl": [entry.get("kl") for entry in history],
        "t": [entry.get("taid_t") for entry in history],
        "evaluated": {name: evaluated[name] for name in ("eval_loss", "eval_kl", "eval_ce") if name in evaluated},
        "weights": sum(float(parameter.double().sum()) for parameter in trainer.model.parameters()),
    }
    Path(output, f"rank{trainer.args.process_index}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
