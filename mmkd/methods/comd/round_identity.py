"""What decides the rounds of a run, so that a folder is never gone on with in another way."""

import hashlib
import json
from pathlib import Path

from mmkd.errors import UserError
from mmkd.recipe.recipe import Run

from .comd_prompts import Prompts
from .round_files import read_json, write_json

_FILE = "comd.json"

# What may change between two runs of one folder: where servers stand, how far to go, how much at a time.
_FREE = {"output_dir", "rounds", "max_teacher_tokens", "max_new_instructions", "resume_from_checkpoint", "dry_run"}
_FREE |= {"teacher_server", "assessor_server", "augmentor_server", "teacher_concurrency", "teacher_timeout"}
_FREE |= {"generation_batch_size", "prompts", "logging_steps", "save_strategy", "save_steps", "report_to", "schedule"}
_FREE |= {"stages", "env", "disable_tqdm", "accelerate_config"}


def check_identity(folder: Path, run: Run, prompts: Prompts) -> None:
    """Writes down what decides the rounds. Raises UserError when the folder's rounds were made in another way."""
    keys = {key: value for key, value in run.recipe.keys.items() if key not in _FREE}
    # The empty list held flags, which were no keys in version 0.1.
    content = json.dumps([keys, []], sort_keys=True, default=str)
    ours = {"settings": hashlib.sha256(content.encode()).hexdigest()[:16], "prompts": prompts.digests}
    # Without a round there is nothing that other settings could mix with.
    theirs = read_json(folder / _FILE) if any(folder.glob("round-*")) else None
    if theirs is not None and theirs["settings"] != ours["settings"]:
        raise UserError(
            f"The rounds in {folder} were made with other settings than now. Name another output_dir, or delete the "
            f"folder; only {', '.join(sorted(_FREE))} may change."
        )
    if theirs is not None and theirs["prompts"] != ours["prompts"]:
        changed = sorted(name for name, digest in ours["prompts"].items() if theirs["prompts"].get(name) != digest)
        raise UserError(
            f"The rounds in {folder} were made with other prompts ({', '.join(changed)}): those in "
            f"{folder / 'prompts'}. Give these with --prompts, or name another output_dir."
        )
    write_json(folder / _FILE, {**ours, "name": str(run.arguments.teacher)})
