"""A recipe as a value: read once, never changed; everything that runs derives its own from it."""

import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from mmkd.data.credentials import refuse_secrets
from mmkd.errors import UserError, nearest
from mmkd.files import write_file
from mmkd.results.own_teacher import SELF
from mmkd.schema_lines import schema_line, without_schema_line
from mmkd.shipped import find_recipe
from mmkd.training.config import DistillationConfig
from mmkd.training.method import METHODS
from mmkd.training.rewards import reward_columns
from mmkd.yaml_files import AsWritten, read_yaml

from .arguments import VIEW, RunArguments, StudentArguments
from .cache_arguments import CacheArguments
from .key_hints import hint_at
from .key_parser import parser_of, set_environment, with_text
from .launch_keys import launch_keys_of
from .self_checks import check_self, named_self

STAGE_KEYS = ("stages", "schedule")
"""Keys of a recipe that is trained in stages; `mmkd.recipe.stages` reads them."""


@dataclass(frozen=True)
class Recipe:
    """The keys of one run, text as it was written. `with_` and `without` give another one and leave this as it is."""

    written: Mapping[str, Any]
    """Keys of its file."""
    name: str = ""
    """As the user named it: a path, or a shipped recipe."""
    place: str = ""
    """Path of its YAML, which errors name."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Keys that win over the file's, and in a recipe in stages over those of every stage: what flags have set."""
    launch: Mapping[str, Any] = field(default_factory=dict)
    """What flags say to `accelerate launch`, accelerate_config among it. It starts processes and decides no result."""
    spelled: Mapping[str, Sequence[str]] = field(default_factory=dict, compare=False, repr=False)
    """The words that flags gave for a key: 2e-2 is 0.02 to everybody but the results that version 0.1 kept."""
    text: str = field(default="", compare=False, repr=False)
    """Of its file, comments and all."""
    command: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """What was typed after mmkd-train for the run that this recipe is a part of."""

    def __post_init__(self) -> None:
        """Raises UserError for a secret among the keys, since all that is derived from them is written down."""
        refuse_secrets(self.keys)

    @classmethod
    def of(cls, keys: Mapping[str, Any], place: str | Path) -> "Recipe":
        """The recipe of keys that stand in no file yet; `place` is the path they would have."""
        return cls(dict(keys), str(place), str(place), command=(str(place),))

    @classmethod
    def read(cls, name_or_path: str | Path) -> "Recipe":
        """The recipe in a file, or a shipped one. Raises UserError when the file is no YAML mapping.

        No key may stand there twice.
        """
        path, name = find_recipe(name_or_path), str(name_or_path)
        # Where the schema lies says nothing of the run, and comparisons are found by this text.
        text = without_schema_line(path.read_text(encoding="utf-8"))
        return cls(_read_keys(path), name, str(path), text=text, command=(name,))

    @property
    def keys(self) -> dict[str, Any]:
        """All keys of the run."""
        return {**self.written, **self.overrides}

    @property
    def method(self) -> str:
        """The name of its method. Raises UserError when it is none of METHODS."""
        method = self.keys.get("method")
        if not isinstance(method, str) or method not in METHODS:
            raise UserError(
                f"method is {method!r}; set it to one of {', '.join(METHODS)}.{hint_at(str(method), METHODS)}"
            )
        return method

    @property
    def accelerate_config(self) -> str | None:
        """The configuration that training is launched with."""
        return self.launch.get("accelerate_config", self.written.get("accelerate_config"))

    @property
    def in_stages(self) -> bool:
        """Whether it is trained in stages."""
        return "stages" in self.written

    @property
    def stages(self) -> Mapping[str, Mapping[str, Any]]:
        """The keys of each stage, by name. Raises UserError for what is no such mapping."""
        stages = self.written.get("stages")
        if not isinstance(stages, dict) or not all(isinstance(keys, dict) for keys in stages.values()):
            raise UserError(
                f"{self.place}: stages must be a mapping of a name to its keys, such as `SFT: {{method: sft}}`."
            )
        return stages

    def stage(self, name: str) -> "Recipe":
        """The recipe of one stage: what all of them share under its own keys; null there takes a key away.

        Raises UserError for a stage that there is not.
        """
        if name not in self.stages:
            near = nearest(name, self.stages)
            raise UserError(f"There is no stage {name!r} in {self.place}; did you mean {near!r}?")
        foreign = self._of_other_stages(name)
        keys = {**self.without(*STAGE_KEYS, *foreign).written, **self.stages[name]}
        written = {key: value for key, value in keys.items() if value is not None}
        return replace(self.without(*STAGE_KEYS, *foreign), written=written)

    def _of_other_stages(self, name: str) -> set[str]:
        """The keys that all stages share and that one which predicts no tokens has no use for, while others have.

        A stage that trains a vision tower alone stands beside stages whose max_length, say, means nothing to it.
        """
        own = {**self.keys, **self.stages[name]}.get("method")
        if not isinstance(own, str) or own not in METHODS or METHODS[own].predicts == "tokens":
            return set()
        others = {{**self.keys, **keys}.get("method") for keys in self.stages.values()} - {own}
        known = {key for method in others if method in METHODS for key in parser_of(method).names}
        return (self.keys.keys() & known) - set(parser_of(own).names)

    def with_(self, **keys: Any) -> "Recipe":
        """The recipe with other values for some keys, which win over its file's and over those of its stages."""
        spelled = {key: words for key, words in self.spelled.items() if key not in keys}
        return replace(self, overrides={**self.overrides, **keys}, spelled=spelled)

    def without(self, *names: str) -> "Recipe":
        """The recipe without some of its keys."""
        written, overrides = (
            {key: value for key, value in keys.items() if key not in names} for keys in (self.written, self.overrides)
        )
        return replace(self, written=written, overrides=overrides)

    def flags(self) -> list[str]:
        """The flags that make this recipe of its file, each in one spelling."""
        return _flags_of(self.overrides, self.spelled)

    def command_line(self) -> list[str]:
        """What says the same after mmkd-train."""
        return [self.name, *self.flags(), *_flags_of(self.launch, {})]

    def write(self, path: Path, comment: str = "") -> "Recipe":
        """Writes all keys to a file, under a comment, and returns the recipe of that file."""
        header = f"# {comment}\n" if comment else ""
        text = header + yaml.safe_dump(self.keys, sort_keys=False, allow_unicode=True)
        # A file that says the same stays as it is, from a release without that line too.
        if not path.is_file() or without_schema_line(path.read_text(encoding="utf-8")) != text:
            write_file(path, schema_line("recipe", path) + text)
        place = str(path)
        return replace(self, written=self.keys, name=place, place=place, overrides={}, spelled={}, text=text)

    def parse(self) -> "Run":
        """The run that the recipe describes.

        Raises UserError for an unknown key, naming the nearest real one, and for values that cannot be.
        """
        method, keys = self.method, self.keys
        parser = parser_of(method)
        known = {*parser.names, *STAGE_KEYS, "env", "accelerate_config"}
        if self.accelerate_config is not None:
            known |= launch_keys_of(parser.names)
        for key in (key for key in keys if key not in known):
            if key in self.overrides:
                raise UserError(f"--{key} is no flag of method {method}.{hint_at(key, parser.names)}")
            raise UserError(
                f"{self.place} sets {key!r}, which method {method} does not know.{hint_at(key, parser.names)}"
            )
        set_environment(keys)
        arguments, training, student, cache = parser.read(keys)
        check_self(arguments, training)
        run = Run(arguments, training, student, cache, self)
        return run.itself_named(keys) if arguments.teacher == SELF else run

    def to_go_on(self) -> str:
        """The command that goes on with the run from its last checkpoint."""
        return f"mmkd-train {shlex.join(self.command)} --resume_from_checkpoint true"


@dataclass
class Run:
    """A parsed recipe."""

    arguments: RunArguments
    training: DistillationConfig
    student: StudentArguments
    cache: CacheArguments
    recipe: Recipe
    itself: bool = False
    """Whether the student is the teacher: `teacher` is its name then, for whoever reads its files."""
    own_rows: tuple[str, str] | None = None
    """Of the run of one of several teachers: a column, and the value in it of the rows that concern this one."""

    @property
    def keys(self) -> dict[str, Any]:
        """Of the recipe, as they were given."""
        teachers = self.arguments.teachers
        # A recipe may say it as JSON.
        return {**self.recipe.keys, **({} if teachers is None else {"teachers": teachers})}

    def by_teacher(self) -> dict[str, "Run"]:
        """The run as it would be with each of several teachers alone, by name; the run itself, as "", without them."""
        arguments = self.arguments
        if arguments.teachers is None:
            return {"": self}
        assert isinstance(arguments.teachers, dict)
        column, runs = arguments.teacher_column, {}
        for name, keys in arguments.teachers.items():
            own = {key: value for key, value in keys.items() if key not in ("weight", VIEW)}
            alone = replace(arguments, teachers=None, teacher_column=None, **own)
            training = copy(self.training)
            if isinstance(training, DistillationConfig):
                training.teacher_view = keys.get(VIEW, training.teacher_view)
            own_rows = None if column is None else (column, name)
            run = replace(self, arguments=alone, training=training, own_rows=own_rows)
            runs[name] = run.itself_named(own) if alone.teacher == SELF else run
        return runs

    def itself_named(self, given: Collection[str]) -> "Run":
        """The run with the student's name in the place of `self`, of whom the `given` keys speak.

        Raises UserError where the student cannot teach itself.
        """
        named = named_self(self.arguments, self.training, self.student, given)
        return replace(self, arguments=replace(self.arguments, **named), itself=True)

    def named(self) -> "Run":
        """The run in which a student that teaches itself is a model of its own that is asked: the one it began as."""
        if not self.itself:
            return self
        training = copy(self.training)
        training.self_teacher = None
        return replace(self, training=training, itself=False)

    @property
    def columns_read(self) -> list[str]:
        """The columns of the data that teachers and a reward read besides what is trained on."""
        views = [run.training.view for run in self.by_teacher().values()]
        read = [name for view in views if view is not None for name in view.reads]
        return list(dict.fromkeys([*read, *reward_columns(self.training)]))

    def hub(self, revision: str | None) -> dict[str, Any]:
        """Keyword arguments of `from_pretrained` for something of this run."""
        return {"revision": revision, "trust_remote_code": self.training.trust_remote_code}


def _flags_of(keys: Mapping[str, Any], spelled: Mapping[str, Sequence[str]]) -> list[str]:
    words: list[str] = []
    for key, value in keys.items():
        values = list(spelled.get(key, map(_word, value if isinstance(value, list) else [value])))
        dashes = len(values) == 1 and values[0].startswith("--")
        words += [f"--{key}={values[0]}"] if dashes else [f"--{key}", *values]
    return words


def _word(value: Any) -> str:
    """A value as it is written on a command line."""
    plain = value is None or isinstance(value, bool | dict | list)
    return json.dumps(value, ensure_ascii=False) if plain else str(value)


def _read_keys(path: Path) -> dict[str, Any]:
    keys = read_yaml(path)
    if not isinstance(keys, dict):
        raise UserError(f"{path} is no recipe: it must hold `key: value` lines, with at least method and data.")
    written = read_yaml(path, as_written=True)
    if isinstance(keys.get("env"), dict):
        for name, value in written["env"].items():
            # TRL writes str(value) into the environment: True for yes, 321 for 00501.
            if isinstance(value, AsWritten | bool):
                raise UserError(
                    f"{path}: env.{name} is text that YAML reads as {keys['env'][name]!r}; put it in quotes."
                )
    stages = keys.get("stages")
    if isinstance(stages, dict):
        keys["stages"] = {
            name: with_text(own, written["stages"].get(str(name), {})) if isinstance(own, dict) else own
            for name, own in stages.items()
        }
    return with_text(keys, written)
