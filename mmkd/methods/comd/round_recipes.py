"""The recipe of one round: an ordinary recipe of sft, kd or taid on the pool, which anyone can run again alone."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from mmkd.errors import UserError
from mmkd.files import write_file
from mmkd.recipe.arguments import MAKING_KEYS, RunArguments
from mmkd.recipe.key_parser import parser_of
from mmkd.recipe.recipe import Recipe, Run
from mmkd.schema_lines import schema_line
from mmkd.training.config import DistillationConfig

from .comd_trainer import CoMDConfig

_TEACHER = ("teacher", "teacher_server", "teacher_server_model", "teacher_cache")

STUDENT, ADAPTER = "student", "adapter"
"""Folders of a round: the student, and what LoRA has made of it before that is merged into the student."""

OWN_KEYS = {field.name for field in fields(CoMDConfig)} - {field.name for field in fields(DistillationConfig)}
"""Keys that only the loop reads."""

_SET_HERE = {"method", "data", "student", "output_dir", "resume_from_checkpoint", "seed", "ce_weight", "dry_run"}
_SET_HERE |= {*MAKING_KEYS, *_TEACHER, "model_revision", "max_train_rows", "max_eval_rows"}
_SET_HERE |= {"push_to_hub", "hub_model_id"}
# The pool is of prompts and completions: answers alone are learnt, whatever a chat template marks.
_SET_HERE |= {"assistant_only_loss", "completion_only_loss"}


def student_keys(run: Run) -> dict[str, Any]:
    """Where the first round's student comes from; one pruned from the teacher names it as its source."""
    arguments = run.arguments
    keys = {name: getattr(arguments, name) for name in MAKING_KEYS}
    keys["model_revision"] = run.student.model_revision
    keys["student"] = arguments.student
    if arguments.student is None:
        keys |= {"student": arguments.teacher, "model_revision": arguments.teacher_revision}
        # A pruned copy of the teacher is as precise as the teacher, as with every other method.
        keys["dtype"] = run.student.dtype or arguments.teacher_dtype
    defaults = {each.name: each.default for each in fields(RunArguments) if each.name in MAKING_KEYS}
    return {name: value for name, value in keys.items() if value is not None and value != defaults.get(name)}


def write_round(run: Run, folder: Path, student: dict[str, Any], number: int, teacher: Path | None = None) -> Recipe:
    """Writes the recipe of a round and returns it; `teacher` stands for the run's own."""
    training = run.training
    assert isinstance(training, CoMDConfig)
    known = set(parser_of(training.round_method).names) - _SET_HERE - OWN_KEYS
    keys = {key: value for key, value in run.recipe.written.items() if key in known}
    keys = {"method": training.round_method, **student, "data": str(folder / "data.yaml"), **keys}
    keys["output_dir"] = str(folder / (ADAPTER if run.student.use_peft else STUDENT))
    if training.round_method != "sft":
        keys |= {name: value for name in _TEACHER[:3] if (value := getattr(run.arguments, name)) is not None}
        if teacher is not None:
            keys["teacher"] = str(teacher)
        if training.round_cache:
            keys["teacher_cache"] = str(folder / "teacher_cache")
    # Rounds on one pool would else see its rows in one order.
    keys |= {"seed": training.seed + number, **_settings(training)}
    overrides = {key: value for key, value in run.recipe.overrides.items() if key in known}
    recipe = replace(run.recipe, written=keys, overrides=overrides)
    return recipe.write(folder / "recipe.yaml", f"Round {number} of comd; mmkd-train runs it alone.")


def write_data(folder: Path, images: bool, held_out: Path | None) -> Path:
    """Writes the data recipe of a round's pool and returns its path."""
    files = {"train": str(folder / "pool.jsonl")}
    columns = {name: name for name in ("prompt", "completion", *(["images"] if images else []))}
    splits = {"train": "train"}
    if held_out is not None:
        files["eval"], splits["eval"] = str(held_out), "eval"
    keys = {"name": f"comd-{folder.name}", "source": "json", "data_files": files, "splits": splits, "columns": columns}
    text = yaml.safe_dump(keys, sort_keys=False, allow_unicode=True)
    path = folder / "data.yaml"
    write_file(path, f"{schema_line('data_recipe', path)}# The pool of a round, with the teacher's answers.\n{text}")
    return path


def _settings(training: CoMDConfig) -> dict[str, Any]:
    settings = training.round_settings or {}
    assert isinstance(settings, dict)
    known = set(parser_of(training.round_method).names)
    for key in settings:
        if key not in known or key in _SET_HERE - {"ce_weight"}:
            raise UserError(f"round_settings has {key!r}, which a recipe of {training.round_method} cannot set here.")
    return settings
