"""One training of a comparison, measured: what it reached on held-out text, item by item, and what it cost."""

import json
import shutil
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from mmkd.cache.store import Cache, read_log
from mmkd.errors import UserError
from mmkd.files import write_file
from mmkd.recipe.arguments import RunArguments
from mmkd.recipe.key_parser import parser_of
from mmkd.recipe.recipe import Recipe, Run
from mmkd.recipe.run import build_trainer
from mmkd.training.method import BASELINE_METHOD, METHODS
from mmkd.training.rollout_config import RolloutConfig

from .model import find_model
from .results import key_of, to_json

BASELINE = "sft-baseline.yaml"

# Keys of a student's recipe that are not those of its baseline, although method sft knows them.
_NOT_SFT = {"ce_weight", "teacher_cache", "teacher_server", "teacher_tail", "teacher_top_k", "temperature"}
_NOT_SFT |= {part.name for part in fields(RolloutConfig) if part.name.startswith("rollout_")} | {"on_policy_fraction"}
_TEACHERS = {"teachers", "teacher_column"}
_PUBLISHING = {"push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo"}
_WHOLE = ("student_layers", "student_intermediate_size", "student_num_attention_heads", "student_vision_tower")


@dataclass(frozen=True)
class Measured:
    """A model of a comparison: the teacher, the student before training, or one training with one seed."""

    stage: str
    """teacher, untrained or trained."""
    folder: str
    """Where it lies: a folder, or the teacher's name."""
    parameters: int
    metrics: dict[str, float]
    """What the trainer's evaluation says, without its prefix."""
    items: dict[str, list[tuple[float, float]]]
    """Metric -> (total, count) of every batch of held-out rows."""
    tokens: int = 0
    """Supervised tokens it was trained on."""
    cost: dict[str, Any] | None = None
    cache: dict[str, Any] | None = None
    weights: str | None = None
    """Of what was trained, as `mmkd push` compares them with those it finds."""


class Trainings:
    """The trainings of a comparison by everything that decides them; each is kept as soon as it is measured."""

    def __init__(self, folder: Path, judge: Recipe | None, save_untrained: bool) -> None:
        self.folder, self.judge, self.save_untrained = folder, judge, save_untrained

    def get(self, recipe: Recipe, stage: str = "trained") -> Measured:
        """The measurements of one training, from the folder or by running it."""
        judge = self.judge
        texts, judged = [recipe.text, *([judge.text] if judge else [])], judge.flags() if judge else []
        key = key_of(texts, recipe.flags(), judged, stage, self.save_untrained if stage == "untrained" else None)
        path = self.folder / "measured" / f"{key[:16]}.json"
        if path.is_file():
            return Measured(**json.loads(path.read_text(encoding="utf-8")))
        # What a cut-off training left is started over.
        place = self.folder / f"{label(recipe).replace(', ', '-')}-{stage}-{key[:6]}"
        shutil.rmtree(place, ignore_errors=True)
        measured = measure(recipe, stage, place, judge, self.save_untrained)
        write_file(path, to_json(vars(measured), indent=1))
        return measured


def measure(recipe: Recipe, stage: str, folder: Path, judge: Recipe | None, save_untrained: bool) -> Measured:
    """Evaluates the recipe's teacher ("teacher") or its student, "untrained" or "trained", which is saved.

    A judge is the recipe whose trainer evaluates the trained student.
    """
    run = _alone(recipe)
    _prepare(run, folder)
    if stage != "trained" and all(
        teacher_run.arguments.teacher is not None for teacher_run in run.by_teacher().values()
    ):
        run = replace(run, arguments=_without_caches(run.arguments))
    if stage == "teacher":
        run = replace(run, arguments=_of(run, run.arguments.teacher))
    trainer = build_trainer(run)
    parameters, tokens, cost = trainer.model.num_parameters(), 0, None
    if stage == "trained":
        tokens, cost = _train(trainer, run)
    if stage == "trained" or (stage == "untrained" and save_untrained):
        trainer.save_model()
    cached = any(teacher_run.arguments.teacher_cache is not None for teacher_run in run.by_teacher().values())
    if stage == "trained" and (judge is not None or cached):
        # Judged by the teacher itself, like all others.
        judging = run if judge is None else _alone(judge)
        _prepare(judging, folder / "judged")
        trainer = build_trainer(replace(judging, arguments=_of(judging, str(folder))))
    trainer.batch_reports = []
    metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    reports = trainer.batch_reports
    items = {
        name: [batch.get(name, (0.0, 0.0)) for batch in reports]
        for name in {key for batch in reports for key in batch}
    }
    place = str(run.arguments.teacher) if stage == "teacher" else str(folder)
    weights = find_model(place).weights if stage == "trained" else None
    return Measured(stage, place, parameters, metrics, items, tokens, cost, _cache_facts(run), weights)


def make_baseline(recipe: Recipe, folder: Path) -> Recipe:
    """A recipe of method sft for the same student, data and steps, written to the folder.

    The teacher stays where its tokens are the student's, to measure the distance to it; it never enters the loss.
    """
    run = recipe.parse()
    known = set(parser_of(BASELINE_METHOD).names) - _NOT_SFT - _PUBLISHING
    if not METHODS[run.arguments.method].one_vocabulary and run.arguments.student is not None:
        known -= {key for key in known if key.startswith("teacher")}
    known = {key for key in known if not key.startswith("cache_")}
    kept = {key: value for key, value in recipe.written.items() if key in known}
    if isinstance(teachers := run.arguments.teachers, dict):
        # Of the recipe or of a flag, which would win.
        known -= {"teachers"}
        kept["teachers"] = {name: _without(keys, _NOT_SFT) for name, keys in teachers.items()}
        if not all(keys.get("teacher") for keys in kept["teachers"].values()):
            kept, known = _without(kept, _TEACHERS), known - _TEACHERS
    comment = f"The SFT baseline of {recipe.name}: its student, data and settings, without its teacher in the loss."
    made = Recipe.of({**kept, "method": BASELINE_METHOD}, folder / BASELINE).write(folder / BASELINE, comment)
    overrides = {key: value for key, value in recipe.overrides.items() if key in known - {"method"}}
    return replace(made, overrides=overrides, spelled=recipe.spelled)


def label(recipe: Recipe) -> str:
    """A training's name in tables: its method, and its recipe's name where that says more."""
    name = Path(recipe.name).stem
    return recipe.method if name in ("quickstart", Path(BASELINE).stem, recipe.method) else f"{recipe.method}, {name}"


def _alone(recipe: Recipe) -> Run:
    """The run of a recipe that saves nothing and whose batches of held-out rows are items to resample."""
    settings = {"per_device_eval_batch_size": 1, "save_strategy": "no"}
    return recipe.with_(**{**settings, **recipe.overrides}).parse()


def _prepare(run: Run, folder: Path) -> None:
    training = run.training
    training.output_dir, training.push_to_hub = str(folder), False
    training.include_num_input_tokens_seen = "non_padding"


def _of(run: Run, model: str | None) -> Any:
    """The run's arguments with a whole model in the place of its student."""
    if model is None:
        raise UserError("The recipe names no `teacher`, so that nobody can be judged by it: set it beside its cache.")
    own = {"student": model, "student_init": "pretrained", **dict.fromkeys(_WHOLE)}
    return replace(_without_caches(run.arguments), **own)


def _without_caches(arguments: RunArguments) -> RunArguments:
    """The same teachers, who answer themselves."""
    teachers = arguments.teachers
    if isinstance(teachers, dict):
        teachers = {name: _without(keys, {"teacher_cache"}) for name, keys in teachers.items()}
    return replace(arguments, teacher_cache=None, teachers=teachers)


def _without(keys: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if key not in names}


def _train(trainer: Any, run: Run) -> tuple[int, dict[str, Any]]:
    """Supervised tokens, and the cost of the training alone."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    begun, spent = time.monotonic(), time.process_time()
    runtime = trainer.train().metrics["train_runtime"]
    seconds, spent = time.monotonic() - begun, time.process_time() - spent
    tokens = next(entry for entry in reversed(trainer.state.log_history) if "supervised_tokens" in entry)
    live = trainer.needs_teacher and any(
        teacher_run.arguments.teacher_cache is None for teacher_run in run.by_teacher().values()
    )
    cost = {
        "unit": "GPU-hours" if cuda else "CPU-hours",
        "hours": (seconds * trainer.args.world_size if cuda else spent) / 3600,
        "seconds": seconds,
        "tokens_per_second": tokens["supervised_tokens"] / runtime,
        "teacher_tokens": int(trainer.state.num_input_tokens_seen) if live else 0,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }
    return int(tokens["supervised_tokens"]), cost


def _cache_facts(run: Run) -> dict[str, Any] | None:
    """What a run's teacher on disk is, and what it cost."""
    if run.arguments.teacher_cache is None:
        return None
    from mmkd.cache.hub import local_cache

    folder = local_cache(run.arguments.teacher_cache)
    manifest = Cache(folder).manifest
    entries = [entry for shards in manifest.shards.values() for entry in shards.values()]
    tokens, size = sum(entry.tokens for entry in entries), sum(entry.bytes for entry in entries)
    return {
        "folder": run.arguments.teacher_cache,
        "signal": {name: value for name, value in manifest.identity["signal"].items() if name != "token_order"},
        "tokens": tokens,
        "bytes": size,
        "bytes_per_token": size / max(1, tokens),
        "hours": sum(line["seconds"] for line in read_log(folder)) / 3600,
    }
