"""The trainings of a comparison, measured: what each reached on held-out rows, item by item, and what it cost."""

import json
import re
import shutil
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmkd.cache.store import Cache, read_log
from mmkd.errors import UserError
from mmkd.files import write_file
from mmkd.recipe.arguments import RunArguments, StudentArguments
from mmkd.recipe.prune_arguments import UNPRUNED
from mmkd.recipe.recipe import Recipe, Run
from mmkd.recipe.run import build_trainer
from mmkd.results.compared import ComparedModel
from mmkd.results.cost import Stopwatch
from mmkd.training.log import hours_of_steps
from mmkd.training.method import Train

from .asked_questions import Questions
from .baselines import comparison_of, label, trains_several_times, without
from .model import find_model
from .own_answers import OwnAnswers
from .results import key_of, to_json
from .whole_runs import measure_whole

_WHOLE = {**UNPRUNED, "student_vision_tower": None}


class Trainings:
    """The trainings of a comparison by everything that decides them; each is kept as soon as it is measured.

    Args:
        folder: where they lie.
        judge: the recipe whose trainer evaluates the students of recipes with a single training.
        questions: what all are asked; needed for recipes that train several times.
        save_untrained: whether the untrained student is kept, to be evaluated on tasks.
        train: trains a recipe in stages or of a driver, as `mmkd-train` does.
        own: the prompts that all answer for their teacher to read.
    """

    def __init__(
        self,
        folder: Path,
        judge: Recipe | None,
        questions: Questions | None,
        save_untrained: bool,
        train: Train,
        own: OwnAnswers | None = None,
    ) -> None:
        self.folder, self.judge, self.questions, self.train, self.own = folder, judge, questions, train, own
        self.save_untrained = save_untrained or questions is not None or own is not None

    def known(self, recipe: Recipe, stage: str = "trained") -> ComparedModel | None:
        """The measurements that an earlier session has left."""
        path = self._path(recipe, stage)
        return ComparedModel(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def get(self, recipe: Recipe, stage: str = "trained") -> ComparedModel:
        """The measurements of one training, from the folder or by running it."""
        known = self.known(recipe, stage)
        if known is not None:
            return known
        measured = self._measure(recipe, stage)
        write_file(self._path(recipe, stage), to_json(vars(measured), indent=1))
        return measured

    def place(self, recipe: Recipe, stage: str = "trained") -> Path:
        """The folder of a training; measured by other questions it is the same."""
        name = re.sub(r"[^\w.-]+", "-", label(recipe))
        if trains_several_times(recipe):
            return self.folder / f"{name}-{key_of([recipe.text], recipe.flags())[:6]}"
        return self.folder / f"{name}-{stage}-{self._key(recipe, stage)[:6]}"

    def _key(self, recipe: Recipe, stage: str) -> str:
        judge = self.judge
        texts, judged = [recipe.text, *([judge.text] if judge else [])], judge.flags() if judge else []
        asked = [each.key for each in (self.questions, self.own) if each is not None]
        return key_of(
            texts, recipe.flags(), judged, stage, self.save_untrained if stage == "untrained" else None, *asked
        )

    def _path(self, recipe: Recipe, stage: str) -> Path:
        return self.folder / "measured" / f"{self._key(recipe, stage)[:16]}.json"

    def _measure(self, recipe: Recipe, stage: str) -> ComparedModel:
        measured = self._measured(recipe, stage)
        if self.own is None:
            return measured
        metrics, items = self.own.measure(measured.folder)
        return replace(measured, metrics={**measured.metrics, **metrics}, items={**measured.items, **items})

    def _measured(self, recipe: Recipe, stage: str) -> ComparedModel:
        place = self.place(recipe, stage)
        own = comparison_of(recipe).measure
        if own is not None:
            shutil.rmtree(place, ignore_errors=True)
            return own(recipe.parse(), stage, place)
        if trains_several_times(recipe):
            assert self.questions is not None, "checked before"
            return measure_whole(recipe, stage, place, self.questions, self.train)
        # What a cut-off training left is started over.
        shutil.rmtree(place, ignore_errors=True)
        measured = measure(recipe, stage, place, self.judge, self.save_untrained)
        if self.questions is None:
            return measured
        _, metrics, items = self.questions.measure(measured.folder)
        return replace(
            measured,
            metrics={**metrics, **measured.metrics},
            items={**items, **measured.items},
            measured_on=self.questions.source,
        )


def measure(recipe: Recipe, stage: str, folder: Path, judge: Recipe | None, save_untrained: bool) -> ComparedModel:
    """Evaluates the recipe's teacher ("teacher") or its student, "untrained" or "trained", which is saved.

    A judge is the recipe whose trainer evaluates the trained student.
    """
    run = _alone(recipe)
    itself = run.itself
    if stage != "trained":
        run = run.named()
    _prepare(run, folder)
    if stage != "trained" and all(
        teacher_run.arguments.teacher is not None for teacher_run in run.by_teacher().values()
    ):
        run = replace(run, arguments=_without_caches(run.arguments))
    if stage == "teacher":
        # The teacher in the student's place is not rounded as that will be.
        run = replace(run, arguments=_of(run, run.arguments.teacher), training=run.training.in_full_precision())
    trainer = build_trainer(run)
    parameters, tokens, cost = trainer.model.num_parameters(), 0, None
    if stage == "trained":
        tokens, cost = _train(trainer, run)
    if stage == "trained" or (stage == "untrained" and save_untrained):
        trainer.save_model()
    cached = any(teacher_run.arguments.teacher_cache is not None for teacher_run in run.by_teacher().values())
    if stage == "trained" and (judge is not None or cached or itself):
        # Judged by the teacher itself, like all others; by what a student that taught itself was before training.
        judging = (run if judge is None else _alone(judge)).named()
        _prepare(judging, folder / "judged")
        student = _whole(folder, folder / "judged" / "whole")
        trainer = build_trainer(
            replace(judging, arguments=_of(judging, student), student=_unquantised(judging.student))
        )
    trainer.batch_reports = []
    metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    shutil.rmtree(folder / "judged" / "whole", ignore_errors=True)
    reports = trainer.batch_reports
    items = {
        name: [batch.get(name, (0.0, 0.0)) for batch in reports]
        for name in {key for batch in reports for key in batch}
    }
    place = str(run.arguments.teacher) if stage == "teacher" else str(folder)
    weights = find_model(place).weights if stage == "trained" else None
    return ComparedModel(stage, place, parameters, metrics, items, tokens, cost, _cache_facts(run), weights)


def _whole(folder: Path, place: Path) -> str:
    """Where a saved student lies as a whole model: one with an adapter is merged into its base at another place."""
    saved = find_model(str(folder))
    if saved.adapter is None:
        return str(folder)
    saved.merged().save_pretrained(place)
    saved.processing_class.save_pretrained(place)
    return str(place)


def _unquantised(student: StudentArguments) -> StudentArguments:
    """How a whole student is loaded that has the values of a base in 4 or 8 bits already."""
    loading = copy(student)
    loading.load_in_4bit = loading.load_in_8bit = False
    return loading


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
    own = {"student": model, "student_init": "pretrained", **_WHOLE}
    return replace(_without_caches(run.arguments), **own)


def _without_caches(arguments: RunArguments) -> RunArguments:
    """The same teachers, who answer themselves."""
    teachers = arguments.teachers
    if isinstance(teachers, dict):
        teachers = {name: without(keys, {"teacher_cache"}) for name, keys in teachers.items()}
    return replace(arguments, teacher_cache=None, teachers=teachers)


def _train(trainer: Any, run: Run) -> tuple[int, dict[str, Any]]:
    """Supervised tokens, and the cost of the training alone."""
    watch = Stopwatch()
    runtime = trainer.train().metrics["train_runtime"]
    cost = watch.cost(trainer.args.world_size)
    log = trainer.state.log_history
    tokens = next(entry["supervised_tokens"] for entry in reversed(log) if "supervised_tokens" in entry)
    live = trainer.needs_teacher and any(
        teacher_run.arguments.teacher_cache is None for teacher_run in run.by_teacher().values()
    )
    asked = int(trainer.state.num_input_tokens_seen) if live else 0
    steps = hours_of_steps(Path(trainer.args.output_dir), trainer.args.world_size)
    own = {"tokens_per_second": tokens / runtime, "teacher_tokens": asked, "step_hours": steps}
    return int(tokens), cost | own


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
