"""The recipes that ship with mmkd: list them, find one by name, copy one to edit."""

import os
import shutil
from pathlib import Path

from mmkd.errors import UserError, nearest

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
    hint = f"the nearest is {nearest(name, recipes)!r}, and " if recipes else ""
    raise UserError(
        f"{os.fspath(name_or_path)!r} is neither a file nor a recipe that ships under {kind}/; "
        f"{hint}`mmkd recipes ls` lists them all."
    )


def copy_recipe(name: str | Path, destination: str | Path, kind: str = "trainers") -> Path:
    """The path of a new copy of a recipe, to edit.

    `destination` is a file, or a folder (an existing one, or a path that ends in a slash) in which the copy keeps its
    name. Raises UserError if the file exists already.
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
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target
