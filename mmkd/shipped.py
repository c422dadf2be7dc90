"""The recipes that ship with mmkd: list them, find one by name, copy one to edit.

A recipe under trainers/ says in the comments at its top what it is for and what it takes, and so does a task of eval/:

    # purpose: What it trains, in a sentence or two; long ones go on
    #   in lines that are indented.
    # hardware: CPU, minutes on two cores     (or: 1 GPU of 24 GB)
    # first: a command to run before it, one per line

They are comments since the keys of a recipe are those of its run. Data recipes and suites have keys for it:
`description` and `prepare`.
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from mmkd.errors import UserError, nearest
from mmkd.schema_lines import moved_schema_line

KINDS = ("trainers", "data_recipes", "eval")

_PACKAGE = Path(__file__).resolve().parent


def recipe_root(kind: str) -> Path:
    """The folder of the shipped recipes of one kind. Raises UserError for a kind that is not in `KINDS`."""
    if kind not in KINDS:
        raise UserError(f"{kind!r} is no kind of recipe; choose one of {', '.join(KINDS)}.")
    packaged = _PACKAGE / "_recipes"
    return (packaged if packaged.is_dir() else _PACKAGE.parent) / kind


def list_recipes(kind: str = "trainers") -> list[str]:
    """The names of the shipped recipes of one kind, sorted, such as `kd/quickstart.yaml`."""
    root = recipe_root(kind)
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.yaml"))


@dataclass(frozen=True)
class Summary:
    """What a shipped recipe is for and what it takes."""

    purpose: str
    hardware: str = ""
    """`CPU`, or the number of GPUs and the memory of each; empty for data and evaluations."""
    first: tuple[str, ...] = ()
    """Commands to run before it."""


def summary_of(name: str, kind: str = "trainers") -> Summary:
    """What the recipe of that name says of itself."""
    text = (recipe_root(kind) / name).read_text(encoding="utf-8")
    if kind == "data_recipes" or name.startswith("suites/"):
        # Neither `mmkd --help` nor finding a recipe waits for it.
        import yaml

        keys = yaml.safe_load(text)
        # The first sentence; the others are for `mmkd recipes show`.
        purpose = re.split(r"(?<=\.)\s", str(keys.get("description", "")).strip())[0]
        return Summary(purpose, first=(keys["prepare"],) if "prepare" in keys else ())
    fields = _header_fields(text)
    return Summary(" ".join(fields["purpose"]), " ".join(fields["hardware"]), tuple(fields["first"]))


def _header_fields(text: str) -> dict[str, list[str]]:
    """The values of each field in the comments at the top of a file."""
    fields: dict[str, list[str]] = {"purpose": [], "hardware": [], "first": []}
    current: list[str] | None = None
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        start = re.match(r"# (purpose|hardware|first): (.+)", line)
        if start is not None:
            current = fields[start[1]]
            current.append(start[2])
        elif current is not None and line.startswith("#   "):
            current[-1] += f" {line[1:].strip()}"
        else:
            current = None
    return fields


def find_any(name_or_path: str) -> Path:
    """The file of a recipe of any kind: an existing file, or a shipped one, `trainers` before the others.

    Raises UserError for a name that is neither.
    """
    for kind in KINDS:
        if name_or_path.startswith(f"{kind}/"):
            return find_recipe(name_or_path, kind)
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    name = f"{name_or_path.removesuffix('.yaml')}.yaml"
    for kind in KINDS:
        # `mmkd eval --suite` takes the name of a suite without its folder.
        for candidate in (name, f"suites/{name}"):
            if candidate in list_recipes(kind):
                return recipe_root(kind) / candidate
    if Path(name_or_path).is_dir():
        return find_recipe(name_or_path)
    near = nearest(name, [other for kind in KINDS for other in list_recipes(kind)])
    raise UserError(
        f"{name_or_path!r} is neither a file nor a recipe that ships; the nearest is {near!r}, and `mmkd recipes ls` "
        "lists them all."
    )


def find_recipe(name_or_path: str | Path, kind: str = "trainers") -> Path:
    """The file of a recipe: an existing file, or otherwise a shipped recipe by its name.

    `kd/quickstart`, `kd/quickstart.yaml` and `trainers/kd/quickstart.yaml` name the same recipe. Raises UserError for
    a name that is neither.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    if name_or_path != "" and path.is_dir():
        inside = sorted(file.name for file in path.iterdir() if file.suffix in (".yaml", ".yml"))
        hint = f"name a recipe in it, such as {os.fspath(path / inside[0])!r}" if inside else "it holds no .yaml file"
        raise UserError(f"{os.fspath(name_or_path)!r} is a folder; {hint}.")
    recipes = list_recipes(kind)
    name = path.as_posix().removeprefix(f"{kind}/").removesuffix(".yaml") + ".yaml"
    if name in recipes:
        return recipe_root(kind) / name
    known = [*recipes, *map(os.fspath, sorted(path.parent.glob("*.y*ml")))]
    hint = f"the nearest is {nearest(name, known)!r}, and " if known else ""
    raise UserError(
        f"{os.fspath(name_or_path)!r} is neither a file nor a recipe that ships under {kind}/; "
        f"{hint}`mmkd recipes ls` lists them all."
    )


def copy_recipe(name: str | Path, destination: str | Path, kind: str = "trainers") -> Path:
    """The path of a new copy of a recipe, to edit.

    `destination` is a file, or a folder (an existing one, or a path that ends in a slash) in which the copy keeps its
    name. Its first line names the schema by which editors check it. Raises UserError if the file exists already.
    """
    source, target = find_recipe(name, kind), Path(destination)
    if target.is_dir() or os.fspath(destination).endswith(("/", os.sep)):
        target = target / source.name
    if os.path.lexists(target):
        raise UserError(f"{target} exists already and would be overwritten; remove it or name another destination.")
    target.parent.mkdir(parents=True, exist_ok=True)
    # The copy gets its name only when it is complete, so that an interrupted copy is not taken for the recipe.
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        shutil.copyfile(source, partial)
        text = source.read_bytes().decode()
        moved = moved_schema_line(text, target)
        if moved != text:
            partial.write_bytes(moved.encode())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target
