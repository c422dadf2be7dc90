"""The recipe that a student is compared with, and recipes with other keys in some of their stages."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmkd.recipe.key_parser import parser_of
from mmkd.recipe.recipe import STAGE_KEYS, Recipe
from mmkd.recipe.stages import plan
from mmkd.training.comparison import Comparison
from mmkd.training.config import DistillationConfig
from mmkd.training.method import BASELINE_METHOD, METHODS
from mmkd.training.rollout_config import ROLLOUT_KEYS

BASELINE = "sft-baseline"
"""Name of the baseline's recipe in the folder of a comparison."""

# Keys of a student's recipe that are not those of its baseline, although method sft knows them.
_NOT_SFT = {"ce_weight", "teacher_cache", "teacher_server", "teacher_tail", "teacher_top_k", "temperature"}
_NOT_SFT |= {*ROLLOUT_KEYS}
_OF_TEACHERS = {"privileged_dropout", "self_teacher", "ema_decay", "ema_every"}
"""Keys about a teacher whose names do not begin with that word."""
_PUBLISHING = {"push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo"}


def methods_of(recipe: Recipe) -> list[str]:
    """The methods that a recipe trains with, stage by stage."""
    return [stage.recipe.method for stage in plan(recipe)] if recipe.in_stages else [recipe.method]


def comparison_of(recipe: Recipe) -> Comparison:
    """How its students are compared: as those of its last stage that distils."""
    methods = methods_of(recipe)
    # A stage before the student is made, of its vision tower alone, decides nothing about how the student is measured.
    last = METHODS[methods[-1]].predicts
    distilling = [name for name in methods if name != BASELINE_METHOD and METHODS[name].predicts == last]
    return METHODS[(distilling or methods)[-1]].comparison


def distils(recipe: Recipe) -> bool:
    """Whether any training of a recipe is of another method than the baseline's."""
    return any(method != BASELINE_METHOD for method in methods_of(recipe))


def trains_several_times(recipe: Recipe) -> bool:
    """Whether a recipe is one of stages or of a driver, which goes on where it was when it is started again."""
    return recipe.in_stages or METHODS[recipe.method].drive is not None


def teacher_of(recipe: Recipe) -> str | None:
    """The teacher that a recipe names, of one in stages the last stage that names one."""
    stages = [stage.recipe for stage in plan(recipe)] if recipe.in_stages else [recipe]
    return next((str(own.keys["teacher"]) for own in reversed(stages) if own.keys.get("teacher")), None)


def has_view(recipe: Recipe) -> bool:
    """Whether a teacher of the recipe, or of a stage of it, reads another prompt than the student."""
    stages = [stage.recipe for stage in plan(recipe)] if recipe.in_stages else [recipe]
    settings = [run.training for own in stages for run in own.parse().by_teacher().values()]
    return any(isinstance(own, DistillationConfig) and own.view is not None for own in settings)


def steps_of(recipe: Recipe) -> int:
    """How long a recipe trains beside others like it: optimizer steps, or epochs where those are given."""
    if recipe.in_stages:
        return sum(steps_of(stage.recipe) for stage in plan(recipe))
    run = recipe.parse()
    training = run.training
    steps = training.max_steps if training.max_steps > 0 else max(1, round(training.num_train_epochs))
    return steps * (1 + METHODS[recipe.method].comparison.repeats(run))


def label(recipe: Recipe) -> str:
    """A training's name in tables: its method, and its schedule or its recipe's name where that says more."""
    if recipe.in_stages:
        methods = methods_of(recipe)
        method = next((method for method in reversed(methods) if method != BASELINE_METHOD), methods[-1])
        return f"{method}, {'-'.join(schedule_of(recipe))}"
    name = Path(recipe.name).stem
    plain = name in ("quickstart", recipe.method) or name.startswith(BASELINE)
    return recipe.method if plain else f"{recipe.method}, {name}"


def schedule_of(recipe: Recipe) -> list[str]:
    """The names of its stages, in order."""
    return [stage.name for stage in plan(recipe)]


def make_baseline(recipe: Recipe, path: Path, student: Path) -> Recipe:
    """The recipe of the same student, data and steps in which no teacher enters the loss, written to the path.

    `student` is the output_dir of the recipe's training, for a baseline that depends on what came of it.
    """
    comment = f"baseline of {recipe.name}: its student, data and settings, without its teacher in the loss."
    if recipe.in_stages:
        return _staged_baseline(recipe, path, student, comment)
    sft = METHODS[recipe.method].comparison.baseline_method is not None
    written, known = _baseline_keys(recipe, student)
    made = Recipe.of(written, path).write(path, f"The {'SFT ' if sft else ''}{comment}")
    # What makes it a baseline of its own method wins over flags.
    own = {"method"} if sft else {"method", *METHODS[recipe.method].comparison.baseline(recipe, student)}
    overrides = {key: value for key, value in recipe.overrides.items() if key in known - own}
    return replace(made, overrides=overrides, spelled=recipe.spelled)


def with_keys(recipe: Recipe, path: Path, keys: Mapping[str, Any], stages: Collection[str] = ()) -> Recipe:
    """The recipe with other keys, which win over flags, written to the path; of one in stages, in some of them."""
    comment = f"{recipe.name} with other keys: {', '.join(keys)}."
    if recipe.in_stages:
        recipe = _with_flags_in_stages(recipe)
        own = {name: {**own, **keys} if name in stages else own for name, own in recipe.stages.items()}
        made = replace(recipe, written={**recipe.written, "stages": own}, overrides={}).write(path, comment)
        return replace(made, overrides=recipe.overrides)
    overrides = without(recipe.overrides, keys)
    made = replace(recipe, written={**recipe.written, **keys}, overrides={}).write(path, comment)
    return replace(made, overrides=overrides, spelled=recipe.spelled)


def _with_flags_in_stages(recipe: Recipe) -> Recipe:
    """The same recipe in stages, where flags stand among the keys of each stage and win over none any more."""
    apart = {"student", "output_dir", "resume_from_checkpoint", *STAGE_KEYS}
    flags = without(recipe.overrides, apart)
    stages = {name: {**own, **flags} for name, own in recipe.stages.items()}
    written = {**recipe.written, "stages": stages, "schedule": schedule_of(recipe)}
    kept = {key: value for key, value in recipe.overrides.items() if key in ("student", "output_dir")}
    return replace(recipe, written=written, overrides=kept, spelled={})


def _baseline_keys(recipe: Recipe, student: Path) -> tuple[dict[str, Any], set[str]]:
    """The keys of a baseline's file, and those that a flag may set."""
    comparison = METHODS[recipe.method].comparison
    own = comparison.baseline(recipe, student)
    if comparison.baseline_method is None:
        known = set(parser_of(recipe.method).names) - _PUBLISHING
        # A flag of the comparison is for the student where the baseline has a value of its own.
        return {**{key: value for key, value in recipe.written.items() if key in known}, **own}, known - own.keys()
    run = recipe.parse()
    known = set(parser_of(comparison.baseline_method).names) - _NOT_SFT - _PUBLISHING
    if not METHODS[run.arguments.method].one_vocabulary and run.arguments.student is not None:
        known -= set(filter(_is_of_teacher, known))
    known = {key for key in known if not key.startswith("cache_")}
    kept = {key: value for key, value in recipe.written.items() if key in known}
    if isinstance(teachers := run.arguments.teachers, dict):
        # Of the recipe or of a flag, which would win.
        known -= {"teachers"}
        kept["teachers"] = {name: without(keys, _NOT_SFT) for name, keys in teachers.items()}
        if not all(keys.get("teacher") for keys in kept["teachers"].values()):
            kept, known = _without_teacher(kept), known - set(filter(_is_of_teacher, known))
    elif run.arguments.teacher is None:
        # That of a cache or a server, which the baseline does not ask.
        kept, known = _without_teacher(kept), known - set(filter(_is_of_teacher, known))
    return {**kept, "method": comparison.baseline_method, **own}, known


def _staged_baseline(recipe: Recipe, path: Path, student: Path, comment: str) -> Recipe:
    """The same stages, with the baseline's method in the place of those that distil.

    A stage that is then another one of the recipe takes its name: DPT-SFT-DFT becomes PT-SFT-SFT.
    """
    recipe = _with_flags_in_stages(recipe)
    shared = {key for key in recipe.written if key not in STAGE_KEYS}
    alone = {name: recipe.stage(name) for name in recipe.stages}
    plain = {name: stage.written for name, stage in alone.items() if stage.method == BASELINE_METHOD}
    stages, schedule = dict(recipe.stages), []
    for stage in plan(recipe.with_(output_dir=str(student))):
        name = stage.name
        if name not in plain:
            keys, _ = _baseline_keys(alone[name], stage.folder)
            keys = _without_teacher(keys)
            name = next((other for other in plain if plain[other] == keys), name)
            if name not in plain:
                # null takes away what all stages share.
                stages[name] = {**keys, **dict.fromkeys(shared - keys.keys())}
        schedule.append(name)
    written = {**recipe.written, "method": BASELINE_METHOD, "stages": stages, "schedule": schedule}
    made = replace(recipe, written=written, overrides={}).write(path, f"The SFT {comment}")
    return replace(made, overrides=without(recipe.overrides, {"output_dir"}))


def _is_of_teacher(key: str) -> bool:
    return key.startswith("teacher") or key in _OF_TEACHERS


def _without_teacher(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if not _is_of_teacher(key)}


def without(keys: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The keys but for some."""
    return {key: value for key, value in keys.items() if key not in names}
