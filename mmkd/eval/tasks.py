"""Tasks by name: those of lm-eval and of mmkd in the same format, with their needs and fingerprints."""

import difflib
import fnmatch
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mmkd.cache.identity import file_sha256
from mmkd.errors import UserError
from mmkd.shipped import recipe_root


@dataclass(frozen=True)
class Task:
    """Properties of a task, or of a group of tasks, before it runs."""

    name: str
    version: Any
    vision: bool
    """Whether its questions have images."""
    fingerprint: str
    """sha256 over its YAML with all included files, the code and data files beside it, and its members."""


class Tasks:
    """The tasks of lm-eval, of mmkd's eval/tasks and of further folders, which take precedence.

    Raises UserError for names that are in none of these.
    """

    def __init__(self, names: Sequence[str], folders: Sequence[str | Path] = ()) -> None:
        for folder in folders:
            if not Path(folder).is_dir():
                raise UserError(f"include_path names {str(folder)!r}, which is no folder of tasks.")
        paths = [recipe_root("eval") / "tasks", *map(Path, folders)]
        self.manager: Any = _own_manager(tuple(paths))
        if not all(_matches(name, self.manager.task_index) for name in names):
            self.manager = _full_manager(tuple(paths))
        index = self.manager.task_index
        for name in names:
            if not _matches(name, index):
                close = difflib.get_close_matches(name, list(index), n=3, cutoff=0.5)
                nearest = f" The nearest: {', '.join(close)}." if close else ""
                raise UserError(
                    f"There is no task {name!r} in lm-eval, in mmkd or in include_path.{nearest} "
                    "`lm_eval ls tasks` lists lm-eval's."
                )

    def matching(self, name: str) -> list[str]:
        """The tasks that match a name or a pattern (`arc_*`)."""
        return _matches(name, self.manager.task_index)

    def __getitem__(self, name: str) -> Task:
        """The properties of a task. Raises UserError if a file of its data is missing."""
        configs = dict(self._configs(name))
        for task, config in configs.items():
            for path in _data_files(config):
                if not Path(path).is_file():
                    prepare = (config.get("metadata") or {}).get("prepare")
                    hint = f"make it with `{prepare}`" if prepare else "check dataset_kwargs in its YAML"
                    raise UserError(f"The data of task {task} is missing: {path} does not exist; {hint}.")
        own = self._entry(name).cfg or {}
        digest = hashlib.sha256(json.dumps(configs, sort_keys=True, default=str).encode())
        for path in sorted({path for task, config in configs.items() for path in self._files(task, config)}):
            digest.update(file_sha256(path).encode())
        vision = any("doc_to_image" in config for config in configs.values())
        return Task(name, (own.get("metadata") or {}).get("version"), vision, digest.hexdigest())

    def _entry(self, name: str) -> Any:
        return self.manager.task_index[name]

    def _configs(self, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The YAML of a task, or of a group or tag and of all its members."""
        entry = self._entry(name)
        config = entry.cfg or {}
        yield name, config
        members = config["task"] if isinstance(config.get("task"), list) else []
        if entry.yaml_path is None:
            members = sorted(entry.tags)
        for member in members:
            member_name = member if isinstance(member, str) else member.get("task")
            if isinstance(member_name, str) and member_name in self.manager.task_index and member_name != name:
                yield from self._configs(member_name)

    def _files(self, name: str, config: dict[str, Any]) -> Iterator[Path]:
        """The files besides its YAML that define a task: its data, and the code beside it if it is not lm-eval's."""
        import lm_eval.tasks

        yield from map(Path, _data_files(config))
        path = self._entry(name).yaml_path
        if path is not None and not path.is_relative_to(Path(lm_eval.tasks.__file__).parent):
            yield from path.parent.glob("*.py")


def _own_manager(paths: tuple[Path, ...]) -> Any:
    """The tasks of these folders only."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(paths), include_defaults=False)


@cache
def _full_manager(paths: tuple[Path, ...]) -> Any:
    """The tasks of these folders and of lm-eval, whose 15,000 YAML files take seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(paths))


def _matches(name: str, index: dict[str, Any]) -> list[str]:
    if any(sign in name for sign in "*?["):
        return sorted(fnmatch.filter(index, name))
    return [name] if name in index else []


def _data_files(config: dict[str, Any]) -> list[str]:
    """The local files that a task reads."""
    files = (config.get("dataset_kwargs") or {}).get("data_files") or []
    values = files.values() if isinstance(files, dict) else [files]
    paths = [path for value in values for path in (value if isinstance(value, list) else [value])]
    return [path for path in paths if "://" not in path and not any(sign in path for sign in "*?[")]
