"""A data recipe for a source, as YAML with comments, which gives the same rows as the source named directly."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mmkd.errors import UserError
from mmkd.files import write_file
from mmkd.schema_lines import schema_line

from .classification import ClassificationRecipe
from .data_recipe import BUILDERS, DataRecipe
from .source_description import SourceDescription

_SHARE_GPT = "{column: COLUMN, role_key: from, content_key: value, role_map: {human: user, gpt: assistant}}"


def write_data_recipe(description: SourceDescription, path: Path) -> None:
    """Writes the data recipe of a source to a file.

    Raises UserError if the file exists, is no YAML by its name, or the source is a recipe already.
    """
    recipe = described_recipe(description)
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{path} does not end in .yaml, by which a data recipe is told from rows. Name it so.")
    if os.path.lexists(path):
        raise UserError(f"{path} exists already and would be overwritten; remove it or name another file.")
    write_file(path, recipe_text(description, recipe, path))


def described_recipe(description: SourceDescription) -> DataRecipe | ClassificationRecipe:
    """The recipe that a source's layout asks for. Raises UserError if the source is a data recipe already."""
    by_class = description.kind in ("classes", "class_folders")
    recipe = description.classes if by_class else description.recipe
    assert recipe is not None
    if recipe.name != description.source:
        raise UserError(
            f"{description.source} is a data recipe already. Copy it (a shipped one with `mmkd recipes cp "
            "data_recipes/NAME .`) and edit the copy."
        )
    return recipe


def recipe_text(description: SourceDescription, recipe: DataRecipe | ClassificationRecipe, path: Path) -> str:
    """The YAML of a recipe that will lie at `path`, with comments that say what was recognised."""
    folder, name = path.absolute().parent, str(path) if "/" in str(path) else f"./{path}"
    kind = "class_data_recipe" if isinstance(recipe, ClassificationRecipe) else "data_recipe"
    lines = [
        schema_line(kind, path).rstrip("\n"),
        f"# The rows of {description.source}: {description.spoken}. In the recipe of a run write `data: {name}`.",
        *_comments([f"Read: {', '.join(description.columns)}."]),
        *(_comments([f"Not read: {', '.join(description.unread)}."]) if description.unread else []),
        *_comments(description.notes),
        *_comments(filter(None, [description.needs])),
        "",
        "# license: apache-2.0   # of the rows (SPDX id); it stands on the card of a student",
        *_entry("source", recipe.source if _is_named(recipe) else _moved(recipe.source, folder)),
        *(_entry("config", recipe.config) if recipe.config is not None else []),
        *_revision(recipe),
    ]
    files = {split: _paths(paths, folder) for split, paths in recipe.data_files.items()}
    lines += _entry("data_files", files) if files else []
    lines += _entry("splits", dict(recipe.splits))
    if recipe.image_folder is not None:
        # Relative paths of pictures start at the current folder, wherever the recipe lies.
        here = folder == Path.cwd()
        lines += _entry("image_folder", recipe.image_folder if here else os.path.abspath(recipe.image_folder))
    lines += _class_lines(recipe) if isinstance(recipe, ClassificationRecipe) else _token_lines(description, recipe)
    return "\n".join(lines) + "\n"


def _token_lines(description: SourceDescription, recipe: DataRecipe) -> list[str]:
    lines = ["# The layout is recognised from the rows. To map other columns, remove the # and edit:"]
    lines.append(f"# columns: {_columns(description)}")
    if recipe.eval_rows is not None:
        lines += ["# Held out of train, by a shuffle with this seed.", *_entry("eval_rows", recipe.eval_rows)]
    return [*lines, *_entry("shuffle_seed", recipe.shuffle_seed), "# max_rows: 10000   # train on fewer rows"]


def _columns(description: SourceDescription) -> str:
    """What `columns:` would say for the layout that was recognised."""
    first, *others = description.columns
    images = next((f", images: {name}" for name in description.columns if name in ("image", "images")), "")
    if description.kind in ("sharegpt", "llava"):
        return f"{{messages: {_SHARE_GPT.replace('COLUMN', first)}{images}}}"
    if description.kind == "chat":
        return f"{{messages: {first}{images}}}"
    if description.kind in ("text", "prompts_only"):
        return f"{{{'text' if description.kind == 'text' else 'prompt'}: {first}{images}}}"
    answer = next((name for name in others if name not in ("image", "images", "input", "context")), first)
    if images:
        return f"{{messages: {{user: '{{{first}}}', assistant: '{{{answer}}}'}}{images}}}"
    return f"{{prompt: {first}, completion: {answer}}}"


def _class_lines(recipe: ClassificationRecipe) -> list[str]:
    content = "image" if recipe.image is not None else "text"
    lines = [*_entry(content, getattr(recipe, content)), *_entry("label", recipe.label)]
    if recipe.class_names:
        lines += ["# In the order of their numbers; a teacher such as CLIP reads them."]
        lines += _entry("class_names", list(recipe.class_names))
    if content == "image":
        lines += ["# {} stands for the name of a class; several prompts are averaged."]
        lines += _entry("prompts", list(recipe.prompts))
    if recipe.validation_per_class is not None:
        lines += ["# Rows held out of each class.", *_entry("validation_per_class", recipe.validation_per_class)]
    return lines


def _revision(recipe: DataRecipe | ClassificationRecipe) -> list[str]:
    if recipe.revision is not None:
        return _entry("revision", recipe.revision)
    if recipe.data_files or "/" not in recipe.source or Path(recipe.source).expanduser().is_dir():
        return []
    return ["# revision: COMMIT   # pin one, or the rows change when the data set's authors push"]


def _entry(key: str, value: Any) -> list[str]:
    # Mappings and lists of words stand in one line where they fit.
    flow = isinstance(value, dict | list)
    if not flow:
        return yaml.safe_dump({key: value}, allow_unicode=True).rstrip("\n").split("\n")
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=True, width=110)
    first, *others = text.rstrip("\n").split("\n")
    return [f"{key}: {first}", *(f"  {line}" for line in others)]


def _comments(sentences: Any) -> list[str]:
    return [f"# {sentence}" for sentence in sentences]


def _is_named(recipe: DataRecipe | ClassificationRecipe) -> bool:
    """Whether the source is a kind of file or a Hub id, and no folder."""
    return recipe.source in BUILDERS or not Path(recipe.source).expanduser().is_dir()


def _paths(paths: str | Sequence[str], folder: Path) -> Any:
    moved = [_moved(path, folder) for path in ([paths] if isinstance(paths, str) else paths)]
    return moved[0] if len(moved) == 1 else moved


def _moved(path: str, folder: Path) -> str:
    """A path as a recipe in `folder` has to write it; its paths start at the current folder, then at its own."""
    if "://" in path or folder == Path.cwd() or Path(path).expanduser().is_absolute():
        return path
    place = Path.cwd() / path
    inside = str(place.relative_to(folder)) if place.is_relative_to(folder) else None
    return str(place) if inside is None or (Path.cwd() / inside).exists() else inside
