"""The runs of a recipe in stages before any is trained: each begins with a stand-in for what the one before leaves."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mmkd.alignment.vocab import shared_tokens
from mmkd.cache.hub import is_hub_id
from mmkd.errors import UserError
from mmkd.recipe.recipe import Recipe, Run
from mmkd.recipe.run_teacher import reads_teacher
from mmkd.recipe.stages import Stage, parsed_plan
from mmkd.training.method import METHODS

from . import costs
from . import teacher_checks as teachers
from . import token_checks as tokens
from .empty_models import empty_student
from .facts import render, student_side, take_sample, teacher_side

# What a stage is rendered with before the first one trains: enough to see a template or a column that is not there.
_ROWS = 8


@dataclass(frozen=True)
class StageRun:
    """The run of one stage, or of a recipe without any."""

    name: str
    """Empty for a recipe without stages."""
    title: str
    run: Run
    config: str | None
    """The accelerate_config that training would be launched with."""
    moved: dict[str, str]
    """Folder of an earlier stage -> its stand-in."""

    def place(self, text: str) -> str:
        """A text that speaks of the stages' own folders in the place of their stand-ins."""
        for folder, stand_in in self.moved.items():
            text = text.replace(stand_in, folder)
        return text


def each_run(recipe: Recipe) -> Iterator[StageRun]:
    """The run of a recipe, or those of its stages in order.

    Raises UserError for a recipe that cannot be read, all of its stages before the first is given, and for a stage
    that leaves nothing the next one could be looked at with.
    """
    config = recipe.accelerate_config
    if not recipe.in_stages:
        yield StageRun("", recipe.name, recipe.parse(), config, {})
        return
    stages = parsed_plan(recipe)
    moved: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, stage in enumerate(stages, start=1):
            run = stage.parse(moved)
            title = f"{recipe.name}, stage {number} of {len(stages)}: {stage.name}"
            yield StageRun(stage.name, title, run, config, moved)
            if number < len(stages) and not stage.is_handed_on:
                moved[str(stage.handed_on)] = str(_stand_in(stage, run, Path(scratch)))


def check_stages(stages: Sequence[Stage]) -> None:
    """Raises UserError, naming the stage, for what would end a later stage after the ones before it were trained.

    The next stage to train is not looked at beyond its keys: it says so itself at once.
    """
    for stage in stages:
        stage.parse({})
    missing = [stage for stage in stages if not stage.finished]
    moved: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for stage in missing:
            run = stage.parse(moved)
            try:
                if stage is not missing[0]:
                    check_run = METHODS[run.arguments.method].check or check_tokens
                    check_run(run)
                if stage is not missing[-1]:
                    moved[str(stage.handed_on)] = str(_stand_in(stage, run, Path(scratch)))
            except UserError as error:
                text = f"Stage {stage.name} could not be trained: {_shown(error, moved)}"
                raise UserError(text, because=error.because) from error


def check_tokens(run: Run) -> None:
    """Raises UserError for a student, teachers, data or caches that training would refuse too."""
    rows = min(_ROWS, run.arguments.max_train_rows or _ROWS)
    run = replace(run, arguments=replace(run.arguments, max_train_rows=rows))
    student, sample = student_side(run), take_sample(run)
    ours = student.prepared_as(render(run, student, sample), run)
    for teacher_run in run.by_teacher().values():
        arguments = teacher_run.arguments
        if arguments.teacher is not None:
            teacher = teacher_side(teacher_run)
            if tokens.compares_tokens(run) and (reads_teacher(arguments) or arguments.teacher_server is not None):
                shared_tokens(ours.tokenizer, teacher.tokenizer)
        cache = arguments.teacher_cache
        if cache is not None and costs.is_to_be_built(cache):
            raise UserError(f"its teacher_cache {cache} is not there; build it first with `mmkd cache build`.")
        if cache is not None and not is_hub_id(cache):
            teachers.open_cache(teacher_run)


def _stand_in(stage: Stage, run: Run, scratch: Path) -> Path:
    """A folder with the config and the processor that a stage's student will have, and without its weights."""
    folder = scratch / stage.folder.name
    own = METHODS[run.arguments.method].stand_in
    if own is not None:
        own(run, folder)
        return folder
    student = student_side(run)
    config = empty_student(run, student).config
    if _changes_tokens(run):
        rendered = render(run, student, take_sample(run))
        student = student.prepared_as(rendered, run)
        config.get_text_config().vocab_size = student.rows
    config.save_pretrained(folder)
    student.processing_class.save_pretrained(folder)
    if student.generation is not None:
        student.generation.save_pretrained(folder)
    return folder


def _changes_tokens(run: Run) -> bool:
    training = run.training
    return any(value is not None for value in (training.chat_template_path, training.eos_token, training.pad_token))


def _shown(error: UserError, moved: dict[str, str]) -> str:
    text = str(error)
    for folder, stand_in in moved.items():
        text = text.replace(stand_in, folder)
    return text
