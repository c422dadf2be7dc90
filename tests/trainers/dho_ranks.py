"""Started by torchrun in test_dho.py: trains the tiny dual-head student on two ranks and writes what each saw."""

import json
import sys
from pathlib import Path

from tests.classes import dho, pictures

if __name__ == "__main__":
    output = Path(sys.argv[1])
    trainer = dho(output / "run", {"test_dataset": pictures(3, seed=2)}, per_device_eval_batch_size=2)
    trainer.train()
    log = trainer.state.log_history
    result = {
        "steps": [[entry["loss"], entry["grad_norm"], entry["ce"]] for entry in log if "loss" in entry],
        "test": [entry["test_accuracy"] for entry in log if "test_accuracy" in entry],
        "choice": [trainer.model.config.alpha, trainer.model.config.beta],
        "weights": sum(parameter.double().sum().item() for parameter in trainer.model.parameters()),
    }
    (output / f"rank{trainer.args.process_index}.json").write_text(json.dumps(result))
