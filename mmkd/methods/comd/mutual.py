"""The teacher learns from its student, by LoRA: an extension of ours, which the paper does not attest."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmkd.errors import UserError
from mmkd.models.adapters import merge_adapter
from mmkd.recipe.recipe import Recipe, Run
from mmkd.recipe.run import last_checkpoint
from mmkd.training.progress import phase

from .comd_trainer import CoMDConfig
from .round_files import read_json, write_json, write_lines
from .round_recipes import ADAPTER, write_data

_PARTS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "max_length", "bf16")
_PARTS += ("per_device_train_batch_size", "gradient_accumulation_steps", "report_to", "disable_tqdm", "logging_steps")
_PARTS += ("trust_remote_code", "activation_checkpointing", "use_cpu", "optim")


def teach_teacher(
    run: Run,
    rows: Sequence[Mapping[str, Any]],
    teacher: str,
    folder: Path,
    train: Callable[[Recipe], int],
) -> Path:
    """Trains a copy of the teacher on the student's better answers and returns its folder.

    Raises UserError when the training is interrupted: what was done is gone on with.
    """
    training = run.training
    assert isinstance(training, CoMDConfig)
    lessons, done = folder / "lessons", folder / "teacher" / "taught.json"
    if read_json(done) is not None:
        return done.parent
    write_lines(lessons / "pool.jsonl", rows)
    data = write_data(lessons, any(row["images"] for row in rows), None)
    own = {key: value for key, value in run.recipe.keys.items() if key in _PARTS}
    keys = {
        "method": "sft",
        "student": teacher,
        "data": str(data),
        "output_dir": str(lessons / ADAPTER),
        **own,
        "use_peft": True,
        "max_steps": training.mutual_steps,
        "learning_rate": training.mutual_learning_rate,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "seed": training.seed,
    }
    recipe = replace(run.recipe, written=keys, overrides={})
    recipe = recipe.write(lessons / "recipe.yaml", "What the teacher learns from its student.")
    resumes = last_checkpoint(lessons / ADAPTER) is not None
    with phase("teaching the teacher"):
        status = train(recipe.with_(resume_from_checkpoint=True) if resumes else recipe)
    if status:
        raise UserError(f"Teaching the teacher was interrupted; the same command goes on with {recipe.place}.")
    merge_adapter(lessons / ADAPTER, done.parent, run.training.trust_remote_code)
    write_json(done, {"lessons": len(rows)})
    return done.parent
