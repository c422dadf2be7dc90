"""What a recipe's own words say, before torch, transformers and TRL are imported, which takes ten seconds.

Only what is sure here is refused. Everything is looked at again, and more thoroughly, when the recipe is parsed.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmkd.data.credentials import refuse_secrets
from mmkd.errors import UserError
from mmkd.schema_lines import SCHEMAS
from mmkd.shipped import find_recipe
from mmkd.yaml_files import read_yaml

from .flag_words import split_flags
from .key_hints import hint_at

_ELSEWHERE = {"stages", "schedule", "env", "accelerate_config"}
_FILES = (".json", ".jsonl", ".csv", ".parquet", ".arrow", ".txt", ".tar", ".yaml", ".yml")


def first_look(name: str, flags: Sequence[str], files: bool = True) -> str:
    """What a run will do, in a line. Raises UserError for a recipe, key or flag that cannot be.

    `files` says whether data and output_dir are looked at as well.
    """
    path = find_recipe(name)
    written = read_yaml(path)
    if not isinstance(written, dict):
        # Parsing says what a recipe is.
        return name
    given: dict[str, Any] = {
        flag.name: flag.values[0] if flag.values else True for flag in split_flags(flags) if flag.typed
    }
    keys = {**written, **given}
    # Before a line of them is printed.
    refuse_secrets(keys)
    method = str(keys.get("method"))
    known = keys_of(method)
    if known is not None and not {"accelerate_config", "stages"} & keys.keys():
        for key in (key for key in written if key not in known):
            raise UserError(f"{path} sets {key!r}, which method {method} does not know.{hint_at(key, known)}")
        for flag in (flag for flag in given if flag not in known and flag.removeprefix("no_") not in known):
            raise UserError(f"--{flag} is no flag of method {method}.{hint_at(flag, known)}")
    if files:
        # Parsing says what an output_dir of another type is.
        check_output_dir(keys.get("output_dir") if isinstance(keys.get("output_dir"), str) else None)
        _check_data(keys.get("data"))
    return _line(keys)


def keys_of(method: str) -> set[str] | None:
    """The keys that a recipe of a method of mmkd may set, from the JSON Schema; None for one of another package."""
    schema = json.loads((SCHEMAS / "recipe.schema.json").read_text(encoding="utf-8"))
    of_method = [part["then"]["allOf"] for part in schema["allOf"] if _is_of(part, method)]
    if not of_method:
        return None
    parts = [schema["allOf"][0], *of_method[0]]
    names = [part["$ref"].rpartition("/")[2] for part in parts if "$ref" in part]
    return _ELSEWHERE.union(*(schema["$defs"][name]["properties"] for name in names))


def check_output_dir(output_dir: str | None) -> None:
    """Raises UserError for an output_dir that cannot be written."""
    folder = Path(output_dir or ".").absolute()
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"output_dir {output_dir} cannot be a folder: {folder} is a file. Name another.")
    if not os.access(folder, os.W_OK):
        raise UserError(f"output_dir {output_dir} cannot be written: no right to write in {folder}.")


def _is_of(part: Mapping[str, Any], method: str) -> bool:
    return part.get("if", {}).get("properties", {}).get("method", {}).get("const") == method


def _check_data(data: Any) -> None:
    """Raises UserError for a path at which there is nothing."""
    if not isinstance(data, str) or "://" in data or set("*?[") & set(data):
        return
    looks_like_a_path = data.startswith((".", "/", "~")) or data.endswith(_FILES)
    if looks_like_a_path and not Path(data).expanduser().exists():
        from mmkd.data.recipe_yaml import read_recipe

        read_recipe(data)


def _line(keys: Mapping[str, Any]) -> str:
    stages = keys.get("schedule") or keys.get("stages")
    method = ", then ".join(map(str, stages)) if stages and isinstance(stages, list | dict) else keys.get("method")
    teachers = keys.get("teachers")
    named = ", ".join(map(str, teachers)) if isinstance(teachers, dict) else keys.get("teacher")
    teacher = named or keys.get("teacher_cache") or keys.get("teacher_server")
    init = keys.get("student_init", "pretrained")
    student = keys.get("student") or "the teacher"
    made = student if init == "pretrained" else f"a student made of {student} (student_init: {init})"
    sides = made if teacher is None else f"{made} teaches itself" if teacher == "self" else f"{teacher} teaches {made}"
    return f"{method}: {sides}; data {keys.get('data')}; output_dir {keys.get('output_dir')}"
