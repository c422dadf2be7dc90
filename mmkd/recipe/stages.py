"""A recipe in stages: one command trains them one after another, each from what the one before left behind."""

import difflib
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState

from mmkd.errors import UserError
from mmkd.files import write_file
from mmkd.training.method import METHODS

from .run import STAGE_KEYS, Run, given_flags, last_checkpoint, parse_keys, read_recipe

RECIPE, RECORD = "recipe.yaml", "stage.json"
"""Files of a stage's folder: the recipe of this stage alone, and what it was trained after."""

_TRAINED = ("*.safetensors", "*.bin", "*.distcp", "checkpoint-*", "round-*")

_MAKING = ("student_init", "student_vision_tower", "student_vision_layer", "model_revision")
_MAKING += ("student_layers", "student_intermediate_size", "student_num_attention_heads")


@dataclass(frozen=True)
class Stage:
    """One stage of a schedule."""

    name: str
    folder: Path
    keys: Mapping[str, Any]
    """Its whole recipe."""
    identity: str
    """Of its keys, the flags and all stages before it."""

    @property
    def recipe(self) -> Path:
        return self.folder / RECIPE

    @property
    def finished(self) -> bool:
        return self._record().get("finished", False)

    def _record(self) -> dict[str, Any]:
        path = self.folder / RECORD
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def parse(self, flags: Sequence[str], ignored: Sequence[str], moved: Mapping[str, str]) -> Run:
        """The run of this stage, with other folders in the place of those in `moved`. Raises UserError, naming it."""
        try:
            return parse_keys(self.moved_keys(moved), str(self.recipe), flags, ignored)
        except UserError as error:
            # Its recipe is not written yet.
            text = str(error).replace(f"{self.recipe} sets", "it sets")
            raise UserError(f"Stage {self.name}: {text}") from error

    def moved_keys(self, moved: Mapping[str, str]) -> dict[str, Any]:
        """The keys with other folders in the place of those in `moved`."""
        return {key: moved.get(value, value) if isinstance(value, str) else value for key, value in self.keys.items()}

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
        header = f"# Stage {self.name} of {' -> '.join(schedule)}; mmkd-train runs it alone.\n"
        write_file(self.recipe, header + yaml.safe_dump(dict(self.keys), sort_keys=False, allow_unicode=True))
        state = {"identity": self.identity, "schedule": list(schedule), "finished": finished}
        write_file(self.folder / RECORD, json.dumps(state, indent=1))


def holds_training(folder: Path) -> bool:
    """Whether a run has left weights in its folder: a model, an adapter, a checkpoint, or rounds of comd."""
    return any(any(folder.glob(pattern)) for pattern in _TRAINED)


def plan(recipe: Path, flags: Sequence[str]) -> tuple[list[Stage], list[str]]:
    """The stages that a recipe and flags ask for, in order, and the flags that each of them takes.

    `--stages A B ...` replaces the recipe's `schedule`; `--output_dir` holds the stages' folders; `--student` is where
    the first one starts: a vision-language model's folder goes for all that a student would be made of. Raises
    ValueError for stages that the recipe does not have.
    """
    keys = read_recipe(recipe)
    chosen, flags = split_stages(flags)
    stages = keys.get("stages")
    if not isinstance(stages, dict) or not all(isinstance(one, dict) for one in stages.values()):
        raise UserError(f"{recipe}: stages must be a mapping of a name to its keys, such as `SFT: {{method: sft}}`.")
    schedule = chosen if chosen is not None else list(keys.get("schedule") or stages)
    for name in schedule:
        if name not in stages:
            close = difflib.get_close_matches(name, list(stages), n=1, cutoff=0)
            raise UserError(f"There is no stage {name!r} in {recipe}; did you mean {close[0]!r}?")
    if not schedule:
        raise UserError(f"--stages names no stage; those of {recipe} are {', '.join(stages)}.")
    output, flags = _value_of("output_dir", flags)
    student, flags = _value_of("student", flags)
    # Going on from a checkpoint is no other training.
    _, flags = _value_of("resume_from_checkpoint", flags)
    shared = {key: value for key, value in keys.items() if key not in STAGE_KEYS}
    root = Path(output or shared.get("output_dir") or "runs")
    start = {**shared, **({"student": student} if student else {})}
    if student and _sees_images(student):
        # A model of an earlier stage, say, and not the language model to make one of.
        start = {key: value for key, value in start.items() if key not in _MAKING}
    found: list[Stage] = []
    given = given_flags(flags)
    for number, name in enumerate(schedule, start=1):
        folder = root / f"{number}-{name}"
        own = {key: value for key, value in {**start, **stages[name]}.items() if value is not None}
        if found:
            own = {key: value for key, value in own.items() if key not in _MAKING}
            own["student"] = str(found[-1].folder)
            before = {**found[-1].keys, **given}
            if before.get("use_peft") and not METHODS[before["method"]].leaves_whole_student:
                raise UserError(
                    f"Stage {found[-1].name} trains an adapter (use_peft), and {name} after it begins with a whole "
                    "student. Set use_peft in the last stage only."
                )
        own["output_dir"] = str(folder)
        content = {key: value for key, value in own.items() if key not in ("output_dir", "student") or number == 1}
        content.pop("output_dir", None)
        text = json.dumps([found[-1].identity if found else None, name, content, flags], sort_keys=True, default=str)
        found.append(Stage(name, folder, own, hashlib.sha256(text.encode()).hexdigest()[:16]))
    return found, flags


def train_stages(
    recipe: Path,
    flags: Sequence[str],
    train: Callable[[str, list[str]], int],
    check: Callable[[Sequence[Stage], Sequence[str]], None],
) -> int:
    """Trains the stages that are not finished; the exit status of the first that fails, else 0.

    A stage that was interrupted goes on from its last checkpoint. `train` runs one recipe; `check` raises UserError
    for a stage that could not be trained, before the first one is.
    """
    stages, flags = plan(recipe, flags)
    schedule = [stage.name for stage in stages]
    for stage in stages:
        stage.check()
    check(stages, flags)
    for number, stage in enumerate(stages, start=1):
        if stage.finished:
            print(f"Stage {number}, {stage.name}: finished, kept in {stage.folder}.", file=sys.stderr)
            continue
        print(f"Stage {number} of {len(stages)}, {stage.name}: {stage.folder}", file=sys.stderr)
        stage.record(schedule[:number], finished=False)
        resume = ["--resume_from_checkpoint", "true"] if last_checkpoint(stage.folder) is not None else []
        status = train(str(stage.recipe), [*flags, *resume])
        # No rank may read what another is still writing.
        PartialState().wait_for_everyone()
        if status:
            return status
        stage.record(schedule[:number], finished=True)
    return 0


def split_stages(flags: Sequence[str]) -> tuple[list[str] | None, list[str]]:
    """The names after --stages, None where the flag is absent, and the other flags."""
    chosen: list[str] | None = None
    others: list[str] = []
    taking = False
    for flag in flags:
        if flag.startswith("--"):
            name, _, value = flag.partition("=")
            taking = name == "--stages"
            if taking:
                chosen = [value] if value else []
                continue
        if taking and chosen is not None:
            chosen.append(flag)
        else:
            others.append(flag)
    return chosen, others


def _sees_images(student: str) -> bool:
    config = Path(student) / "config.json"
    return config.is_file() and "vision_config" in json.loads(config.read_text(encoding="utf-8"))


def _value_of(key: str, flags: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of a flag, and the other flags."""
    found: str | None = None
    others: list[str] = []
    waiting = False
    for flag in flags:
        if waiting:
            found, waiting = flag, False
        elif flag == f"--{key}":
            waiting = True
        elif flag.startswith(f"--{key}="):
            found = flag.partition("=")[2]
        else:
            others.append(flag)
    return found, others
