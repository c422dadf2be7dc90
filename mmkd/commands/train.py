"""Runs a recipe: in this process, or through accelerate in as many as its configuration says."""

import importlib.util
import os
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from rich.console import Console
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from mmkd.errors import UserError
from mmkd.models.adapters import merge_adapter
from mmkd.preflight.dry_run import dry_run
from mmkd.preflight.stage_checks import check_stages
from mmkd.recipe.key_parser import parser_of
from mmkd.recipe.launch_keys import launch_keys_of, launch_words
from mmkd.recipe.phases import check_phases, evaluate_alone, finish, trains
from mmkd.recipe.recipe import Recipe, Run
from mmkd.recipe.run import build_trainer, check_surroundings, last_checkpoint, resume_point
from mmkd.recipe.run_summary import print_next_commands
from mmkd.recipe.stages import parsed_plan, plan, train_stages
from mmkd.results.adapter_base import MERGED
from mmkd.seams.accelerate_seam import launch, parsed_launch
from mmkd.training.base import DistillationTrainer
from mmkd.training.interrupt import InterruptCallback
from mmkd.training.method import METHODS
from mmkd.training.progress import within_phase
from mmkd.training.run_trainer import RunTrainer
from mmkd.training.tracking import trackers_open

from .train_command import LAUNCHED

PRESETS = ("single_gpu", "ddp", "fsdp2", "zero2", "zero3")
"""The accelerate configurations in `_presets`."""


def train(recipe: Recipe) -> int:
    """Trains what a recipe describes; returns the exit status.

    With an accelerate_config this process only launches the run; keys that `accelerate launch` knows and the recipe
    does not, such as num_processes, go to it.
    """
    run = recipe.parse()
    if recipe.accelerate_config is not None and LAUNCHED not in os.environ:
        return _launch(recipe, recipe.accelerate_config)
    check_phases(run)
    check_surroundings(run)
    if run.arguments.dry_run:
        if recipe.in_stages:
            return _dry_run_stages(recipe)
        with tempfile.TemporaryDirectory() as folder:
            _dry_run(run, folder)
        return 0
    if recipe.in_stages:
        return _with_next(train_stages(recipe, train, check_stages), recipe)
    drive = METHODS[recipe.method].drive
    if drive is not None:
        return _with_next(drive(run, train), recipe)
    if not trains(run):
        evaluate_alone(build_trainer(run), run)
        return 0
    checkpoint = resume_point(run.training)
    if checkpoint is None and run.training.resume_from_checkpoint:
        print(f"No checkpoint in {run.training.output_dir}: starting from the beginning.", file=sys.stderr)
    gpus = torch.cuda.device_count()
    if gpus > 1 and run.training.world_size == 1 and not run.training.use_cpu:
        print(
            f"Training on one of {gpus} GPUs: accelerate_config ddp, fsdp2, zero2 or zero3 takes all.", file=sys.stderr
        )
    trainer = build_trainer(run)
    if run.training.push_to_hub:
        from mmkd.publish.push_folder import describe

        trainer.describe = describe
    with trackers_open(trainer):
        if not _train(trainer, checkpoint):
            print(f"\nInterrupted at step {trainer.state.global_step}. {_way_on(run)}", file=sys.stderr)
            return 130
        finish(trainer, run)
    return _with_next(0, recipe)


def _with_next(status: int, recipe: Recipe) -> int:
    """The exit status of a run; says what can be done with its student, where it ended well and is no part of more."""
    if not status and not within_phase() and PartialState().is_main_process:
        last = plan(recipe)[-1].parse({}) if recipe.in_stages else recipe.parse()
        print_next_commands(last, Path(recipe.keys.get("output_dir") or last.training.output_dir or "runs"))
    return status


def _train(trainer: RunTrainer, checkpoint: str | None) -> bool:
    """Trains to the end: True. False when interrupted."""
    interrupt = InterruptCallback()
    trainer.add_callback(interrupt)
    # Ranks would leave at different steps and wait for each other: several of them stop at once.
    listening = interrupt.listening() if trainer.args.world_size == 1 else nullcontext()
    try:
        with listening:
            trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        return False
    return not interrupt.asked


def _way_on(run: Run) -> str:
    newest = last_checkpoint(run.training.output_dir or "")
    if newest is None:
        return "Nothing was saved yet: set save_strategy and save_steps to be able to go on from a checkpoint."
    return f"Go on from {newest.name} with: {run.recipe.to_go_on()}"


def _dry_run(run: Run, folder: str) -> DistillationTrainer | None:
    """Says what a run would do, which may write to a folder; returns its trainer if the run has one over tokens."""
    run.training.push_to_hub = False
    run.training.output_dir = folder
    return dry_run(run, Console())


def _dry_run_stages(recipe: Recipe) -> int:
    """Says what each stage would do; one that is not trained yet hands its student on as it began."""
    stages = parsed_plan(recipe)
    moved: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, stage in enumerate(stages, start=1):
            Console().print(f"Stage {number} of {len(stages)}, {stage.name}", style="bold", highlight=False)
            folder = Path(scratch, stage.folder.name)
            trainer = _dry_run(stage.parse(moved), str(folder))
            if trainer is not None and number < len(stages) and not stage.is_handed_on:
                trainer.save_model(str(folder / "student"))
                if stage.trains_adapter:
                    merge_adapter(folder / "student", folder / MERGED, trainer.args.trust_remote_code)
                moved[str(stage.handed_on)] = str(folder / (MERGED if stage.trains_adapter else "student"))
    return 0


def _launch(recipe: Recipe, config: str) -> int:
    """Starts the processes, each with the same recipe; from their environment they know what they are."""
    file = _config_file(config)
    keys = {**recipe.written, **recipe.launch}
    words = launch_words({key: keys[key] for key in keys if key in launch_keys_of(parser_of(recipe.method).names)})
    options = ["--config_file", file, *words, "--module", "mmkd.commands.main", "train", *recipe.command_line()]
    parsed = parsed_launch(options)
    settings = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    if settings.get("distributed_type") == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"accelerate_config {config} needs DeepSpeed: pip install deepspeed, or use fsdp2.")
    processes, machines = (
        settings.get(key, 1) if getattr(parsed, key) is None else getattr(parsed, key)
        for key in ("num_processes", "num_machines")
    )
    _check_world(config, settings.get("distributed_type", "NO"), processes, machines)
    os.environ[LAUNCHED] = config
    try:
        launch(parsed)
    except ChildFailedError as error:
        return _status_of(error)
    except SignalException as error:
        print(f"mmkd: stopped by {error.sigval.name}, and all ranks with it.", file=sys.stderr)
        return 128 + error.sigval
    return 0


def _status_of(error: ChildFailedError) -> int:
    """The exit status of the rank that failed first; says which one it was, and how."""
    rank, failure = error.get_first_failure()
    code = failure.exitcode
    how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
    advice = "; 9 is often the system's, out of memory" if code == -9 else ", for the reason it gave above"
    print(f"mmkd: rank {rank} {how}{advice}. The other ranks were stopped.", file=sys.stderr)
    return 128 - code if code < 0 else code


def _check_world(config: str, kind: str, processes: int, machines: int) -> None:
    """Raises UserError when a configuration does not fit the processes asked for, or those the GPUs here."""
    if processes < 1 or machines < 1 or processes % machines:
        raise UserError(
            f"num_processes is {processes} on num_machines {machines}: give every machine the same number, at least 1."
        )
    if kind == "NO" and processes > 1:
        raise UserError(
            f"accelerate_config {config} is for one process, and num_processes is {processes}. Use ddp, fsdp2, zero2 "
            "or zero3, or set num_processes to 1.",
            because="meaning",
        )
    gpus, here = torch.cuda.device_count(), processes // machines
    if gpus and here > gpus:
        raise UserError(
            f"accelerate_config {config} wants {here} processes on this machine, which has {gpus} GPUs. Set "
            f"num_processes to {gpus * machines}: one process drives one GPU."
        )
    if not gpus and kind == "DEEPSPEED":
        raise UserError(
            f"accelerate_config {config} needs GPUs, and there are none here. Use ddp or fsdp2 to try out.",
            because="upstream",
        )
    if not gpus and here > (os.cpu_count() or 1):
        raise UserError(
            f"accelerate_config {config} wants {here} processes, and this machine has no GPU and {os.cpu_count()} "
            "cores. Set num_processes, such as --num_processes 2."
        )


def _config_file(name: str) -> str:
    if Path(name).is_file():
        return name
    if name not in PRESETS:
        raise UserError(f"accelerate_config {name!r} is neither a file nor one of {', '.join(PRESETS)}.")
    return str(Path(__file__).parent / "_presets" / f"{name}.yaml")
