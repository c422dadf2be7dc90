"""A recipe in stages: one command trains them one after another, each from what the one before left behind."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from mmkd.errors import UserError
from mmkd.files import write_file
from mmkd.models.adapters import merge_adapter
from mmkd.results.adapter_base import MERGED
from mmkd.training.method import METHODS
from mmkd.training.progress import phase

from .arguments import MAKING_KEYS
from .recipe import STAGE_KEYS, Recipe, Run
from .run import last_checkpoint

RECIPE, RECORD = "recipe.yaml", "stage.json"
"""Files of a stage's folder: the recipe of this stage alone, and what it was trained after."""

_TRAINED = ("*.safetensors", "*.bin", "*.distcp", "checkpoint-*", "round-*")

_MAKING = (*MAKING_KEYS, "model_revision")


@dataclass(frozen=True)
class Stage:
    """One stage of a schedule."""

    name: str
    folder: Path
    recipe: Recipe
    identity: str
    """Of its keys and all stages before it."""

    @property
    def finished(self) -> bool:
        return self._record().get("finished", False)

    @property
    def leaves(self) -> str:
        """The key of a stage after this one that what it trained goes to."""
        return METHODS[self.recipe.method].leaves

    @property
    def trains_adapter(self) -> bool:
        """Whether it leaves an adapter, which the next stage gets merged into its model."""
        return bool(self.recipe.keys.get("use_peft")) and not METHODS[self.recipe.method].leaves_whole_student

    @property
    def handed_on(self) -> Path:
        """The folder of the whole student that the next stage begins with."""
        return self.folder / MERGED if self.trains_adapter else self.folder

    @property
    def is_handed_on(self) -> bool:
        """Whether it is finished, and its student in that folder."""
        return self.finished and (not self.trains_adapter or (self.handed_on / "config.json").is_file())

    def hand_on(self) -> None:
        """Merges what it has trained into the student of the next stage; all ranks call it."""
        if not self.is_handed_on and PartialState().is_main_process:
            print(f"Merging the adapter of {self.folder} for the next stage: {self.handed_on}", file=sys.stderr)
            merge_adapter(self.folder, self.handed_on, bool(self.recipe.keys.get("trust_remote_code")))
        PartialState().wait_for_everyone()

    def _record(self) -> dict[str, Any]:
        path = self.folder / RECORD
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def parse(self, moved: Mapping[str, str]) -> Run:
        """The run of this stage, with other folders in the place of those in `moved`. Raises UserError, naming it."""
        keys = self.recipe.written
        written = {key: moved.get(value, value) if isinstance(value, str) else value for key, value in keys.items()}
        try:
            return replace(self.recipe, written=written).parse()
        except UserError as error:
            # Its recipe is not written yet.
            text = str(error).replace(f"{self.recipe.place} sets", "it sets")
            raise UserError(f"Stage {self.name}: {text}", because=error.because) from error

    def check(self) -> None:
        """Raises UserError when the folder holds a stage that was trained in another way."""
        before = self._record()
        if before and before["identity"] != self.identity and holds_training(self.folder):
            raise UserError(
                f"{self.folder} was trained after {' -> '.join(before['schedule'][:-1]) or 'nothing'} with other "
                "settings than now. Name another output_dir, or delete the folder."
            )

    def record(self, schedule: Sequence[str], finished: bool) -> None:
        """Writes the stage's recipe and how it stands."""
        comment = f"Stage {self.name} of {' -> '.join(schedule)}; mmkd-train runs it alone."
        self.recipe.write(self.folder / RECIPE, comment)
        state = {"identity": self.identity, "schedule": list(schedule), "finished": finished}
        write_file(self.folder / RECORD, json.dumps(state, indent=1))


def holds_training(folder: Path) -> bool:
    """Whether a run has left weights in its folder: a model, an adapter, a checkpoint, or rounds of comd."""
    return any(any(folder.glob(pattern)) for pattern in _TRAINED)


def plan(recipe: Recipe) -> list[Stage]:
    """The stages that a recipe asks for, in order: its `schedule`, or all of them.

    Its output_dir holds the stages' folders. `student`, given as a flag, is where the first one starts: a
    vision-language model's folder goes for all that a student would be made of. Raises UserError for stages that the
    recipe does not have.
    """
    stages = recipe.stages
    schedule = recipe.overrides.get("schedule", recipe.written.get("schedule") or list(stages))
    if not schedule:
        raise UserError(f"--stages names no stage; those of {recipe.place} are {', '.join(stages)}.")
    root, student = Path(recipe.keys.get("output_dir") or "runs"), recipe.overrides.get("student")
    # Going on from a checkpoint is no other training.
    own = {"output_dir", "student", "resume_from_checkpoint", *STAGE_KEYS}
    overrides = {key: value for key, value in recipe.overrides.items() if key not in own}
    if student:
        recipe = replace(recipe, written={**recipe.written, "student": student})
    if student and _sees_images(student):
        # A model of an earlier stage, say, and not the language model to make one of.
        recipe = recipe.without(*_MAKING)
    planned: list[Stage] = []
    for number, name in enumerate(schedule, start=1):
        folder = root / f"{number}-{name}"
        own_stage = recipe.stage(name)
        flags = {key: value for key, value in overrides.items() if key in own_stage.overrides}
        staged = replace(own_stage, overrides=flags, name=str(folder / RECIPE), place=str(folder / RECIPE))
        if planned:
            staged = _going_on(staged, planned[-1], [earlier.leaves for earlier in planned])
        staged = replace(staged, written={**staged.written, "output_dir": str(folder)})
        planned.append(Stage(name, folder, staged, _identity(name, staged.keys, planned)))
    return planned


def _going_on(recipe: Recipe, before: Stage, left: Sequence[str]) -> Recipe:
    """The recipe of a stage that begins with what the one before has trained; `left` is what all before it leave.

    Raises UserError for a tower that would be trained when a student is made already.
    """
    name, folder = Path(recipe.name).parent.name.partition("-")[2], str(before.handed_on)
    joined = recipe.keys.get("student_init") == "llava"
    if METHODS[recipe.method].leaves != "student" and "student" in left:
        raise UserError(
            f"Stage {name} trains a vision tower alone, and stage {before.name} before it has made a student that has "
            "one already. Move it to the front of the schedule.",
            because="not built",
        )
    if "student" not in left and joined:
        # A stage that trains the tower further takes it from there, too.
        recipe = recipe.without("student_vision_tower")
        return replace(recipe, written={**recipe.written, "student_vision_tower": folder})
    if "student" not in left and METHODS[recipe.method].leaves == "student":
        raise UserError(
            f"Stage {before.name} trains a vision tower, and stage {name} has no use for one: its student is not made "
            "of a tower and a language model. Set student_init: llava and student_vision_tower.",
            because="meaning",
        )
    layer, init = recipe.keys.get("student_vision_layer"), recipe.keys.get("student_init")
    recipe = recipe.without(*_MAKING)
    reads = {} if layer is None or "student" in left else {"student_vision_layer": layer}
    if init == "inherit":
        # A part of what the stage before has left: this is how a student shrinks in stages.
        reads["student_init"] = init
    return replace(recipe, written={**recipe.written, **reads, "student": folder})


def _identity(name: str, keys: Mapping[str, Any], before: Sequence[Stage]) -> str:
    """Of a stage's keys and all stages before it, wherever their folders are."""
    folder = str(before[-1].handed_on) if before else None
    content = {key: value for key, value in keys.items() if key != "output_dir" and (not before or value != folder)}
    # The empty list held flags, which were no keys in version 0.1.
    text = json.dumps([before[-1].identity if before else None, name, content, []], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def parsed_plan(recipe: Recipe) -> list[Stage]:
    """The stages of `plan`. Raises UserError too for one whose keys cannot be, before the first is looked at."""
    stages = plan(recipe)
    for stage in stages:
        stage.parse({})
    return stages


def train_stages(recipe: Recipe, train: Callable[[Recipe], int], check: Callable[[Sequence[Stage]], None]) -> int:
    """Trains the stages that are not finished; the exit status of the first that fails, else 0.

    A stage that was interrupted goes on from its last checkpoint. `train` runs one recipe; `check` raises UserError
    for a stage that could not be trained, before the first one is.
    """
    stages = plan(recipe)
    schedule = [stage.name for stage in stages]
    for stage in stages:
        stage.check()
    check(stages)
    for number, stage in enumerate(stages, start=1):
        if stage.finished:
            print(f"Stage {number}, {stage.name}: finished, kept in {stage.folder}.", file=sys.stderr)
            if number < len(stages):
                stage.hand_on()
            continue
        print(f"Stage {number} of {len(stages)}, {stage.name}: {stage.folder}", file=sys.stderr)
        stage.record(schedule[:number], finished=False)
        if stage.trains_adapter and PartialState().is_main_process:
            # Of an earlier training, which this one does not go on from.
            shutil.rmtree(stage.handed_on, ignore_errors=True)
        resumes = last_checkpoint(stage.folder) is not None
        with phase(f"stage {number} of {len(stages)}, {stage.name}"):
            status = train(stage.recipe.with_(resume_from_checkpoint=True) if resumes else stage.recipe)
        # No rank may read what another is still writing.
        PartialState().wait_for_everyone()
        if status:
            return status
        stage.record(schedule[:number], finished=True)
        if number < len(stages):
            stage.hand_on()
    return 0


def _sees_images(student: str) -> bool:
    config = Path(student) / "config.json"
    return config.is_file() and "vision_config" in json.loads(config.read_text(encoding="utf-8"))
