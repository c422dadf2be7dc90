"""Suites: named lists of tasks, with the number of few-shot examples and the main metric of each."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from mmkd.errors import UserError
from mmkd.shipped import find_recipe, list_recipes

HARNESSES = ("lm-eval", "lmms-eval")
"""The programs that run tasks."""

NEEDS = ("vision",)
"""The abilities that a task may require of a model."""


@dataclass(frozen=True)
class SuiteTask:
    """One task of a suite: its name in the harness, and settings that differ from the harness's defaults."""

    task: str
    metric: str | None = None
    """The main metric, such as `acc` or `exact_match,flexible-extract`; by default the task's first."""
    num_fewshot: int | None = None
    harness: str = "lm-eval"
    needs: str | None = None
    """`vision`: the task is left out for models that read text only."""
    chat_template: bool | None = None
    """Whether to apply the chat template; by default if the model has one."""

    def __post_init__(self) -> None:
        if self.harness not in HARNESSES:
            raise UserError(f"Task {self.task} names the harness {self.harness!r}; use {' or '.join(HARNESSES)}.")
        if self.needs not in (None, *NEEDS):
            raise UserError(f"Task {self.task} needs {self.needs!r}, which is none of {', '.join(NEEDS)}.")


@dataclass(frozen=True)
class Suite:
    """A named list of tasks."""

    name: str
    tasks: tuple[SuiteTask, ...]
    description: str = ""
    prepare: str | None = None
    """The command that writes the data, if it is not downloaded."""


def suite_names() -> list[str]:
    """The suites that ship with mmkd."""
    return [Path(name).stem for name in list_recipes("eval") if name.startswith("suites/")]


def tasks_of(suites: Sequence[str], tasks: Sequence[str]) -> list[SuiteTask]:
    """The tasks of suites, and tasks by name after them. Raises UserError as `load_suite` does."""
    return [task for name in suites for task in load_suite(name).tasks] + [SuiteTask(name) for name in tasks]


def load_suite(name_or_path: str) -> Suite:
    """A suite that ships with mmkd, or a suite in a file. Raises UserError for an unknown name and unknown keys."""
    if Path(name_or_path).is_file():
        path = Path(name_or_path)
    elif name_or_path in suite_names():
        path = find_recipe(f"suites/{name_or_path}", "eval")
    else:
        raise UserError(
            f"There is no suite {name_or_path!r}, shipped or as a file.{_nearest(name_or_path, suite_names())} "
            f"All suites: {', '.join(suite_names())}."
        )
    keys: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(keys, dict) or not isinstance(keys.get("tasks"), list) or not keys["tasks"]:
        raise UserError(f"{path} is no suite: it must list tasks, each as `- task: NAME`.")
    _check(path, keys, Suite)
    tasks: list[Any] = [{"task": task} if isinstance(task, str) else task for task in keys["tasks"]]
    for task in tasks:
        if not isinstance(task, dict) or "task" not in task:
            raise UserError(f"{path}: {task!r} is no task; write `- task: NAME`.")
        _check(path, task, SuiteTask)
    return Suite(**{"name": path.stem, **keys, "tasks": tuple(SuiteTask(**task) for task in tasks)})


def _check(path: Path, keys: dict[str, Any], kind: Any) -> None:
    known = [field.name for field in fields(kind)]
    for key in keys:
        if key not in known:
            raise UserError(f"{path} sets {key!r}, which a {kind.__name__} does not have.{_nearest(key, known)}")


def _nearest(word: str, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, choices, n=3, cutoff=0.4)
    return f" The nearest: {', '.join(close)}." if close else ""
