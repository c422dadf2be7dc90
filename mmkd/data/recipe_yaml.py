"""Reading a data recipe: find its YAML, check every key, and load the recipes it mixes."""

import dataclasses
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mmkd.errors import UserError, nearest
from mmkd.yaml_files import AsWritten, read_yaml

from .columns import MessagesColumn, TurnColumns, is_template
from .data_recipe import DataRecipe, MixturePart
from .direct_source import direct_recipe
from .filter_options import DataFilters

_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_KINDS |= {dict: "{key: value}", list: "a list"}


def read_recipe(name_or_path: str, *, root: Path | None = None) -> DataRecipe:
    """What `DataRecipe.load` returns and raises."""
    return _load(name_or_path, root=root, base=None, parents=())


def _find(name_or_path: str, root: Path | None, base: Path | None) -> Path | DataRecipe:
    """The YAML's path, or the recipe of rows that are named directly. Raises UserError when there is neither."""
    is_path = "/" in name_or_path or bool(Path(name_or_path).suffix)
    tried = [folder / Path(name_or_path).expanduser() for folder in (Path.cwd(), base) if folder is not None]
    if is_path and Path(name_or_path).suffix in (".yaml", ".yml"):
        path = next((path for path in tried if path.is_file()), None)
        if path is None:
            raise UserError(f"no data recipe at {' or '.join(map(str, tried))}; check the path.")
        return path.resolve()
    if not is_path:
        if root is None:
            from mmkd.shipped import recipe_root

            root = recipe_root("data_recipes")
        path = root / f"{name_or_path}.yaml"
        if path.is_file():
            return path.resolve()
    inside = next((folder / "data.yaml" for folder in tried if (folder / "data.yaml").is_file()), None)
    if inside is not None:
        return inside.resolve()
    recipe = direct_recipe(name_or_path, base=base)
    if recipe is not None:
        return recipe
    if is_path:
        raise UserError(
            f"no file, folder or data recipe at {' or '.join(map(str, tried))}; {_advice(tried)} `data` names a data "
            "recipe, a file of rows, a folder, a glob, or owner/name on the Hub."
        )
    assert root is not None
    shipped = sorted(path.stem for path in root.glob("*.yaml"))
    hint = f"did you mean {nearest(name_or_path, shipped)!r}? " if shipped else ""
    raise UserError(
        f"unknown data recipe {name_or_path!r}; {hint}Those in {root}: {', '.join(shipped) or 'none'}. "
        "For a recipe of your own give its path, such as ./my_data.yaml; rows may be named directly, such as "
        "./rows.jsonl."
    )


def _advice(tried: Sequence[Path]) -> str:
    """What to do about a path that is not there: the nearest name beside it, where one is near."""
    if any(character in tried[0].name for character in "*?["):
        return "no file matches this glob; check it."
    for path in tried:
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        for name in get_close_matches(path.name, names, 1, 0.8):
            return f"did you mean {name}?"
    return "check the path."


def _load(name_or_path: str, *, root: Path | None, base: Path | None, parents: tuple[Path, ...]) -> DataRecipe:
    path = _find(name_or_path, root, base)
    if isinstance(path, DataRecipe):
        return path
    if path in parents:
        chain = " -> ".join(p.stem for p in (*parents, path))
        raise UserError(f"the mixture is cyclic: {chain}; a recipe cannot be a part of itself.")
    raw = read_yaml(path, as_written=True)
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds {type(raw).__name__}, not keys and values; start with `source:` or `mixture:`.")
    raw = {"name": path.stem, **raw}
    values = _values(raw, DataRecipe, path.name)
    if "columns" in values:
        values["columns"] = {ours: _column(ours, theirs, path.name) for ours, theirs in values["columns"].items()}
    if "data_files" in values:
        values["data_files"] = {
            split: _paths(split, files, path.name) for split, files in values["data_files"].items()
        }
    if "rows" in values:
        values["rows"] = {split: _read_as(count, int) for split, count in raw["rows"].items()}
    if "filters" in values:
        values["filters"] = DataFilters(**_values(raw["filters"], DataFilters, f"{path.name}: filters"))
    if "mixture" in values:
        values["mixture"] = tuple(_part(part, path, root, (*parents, path)) for part in raw["mixture"])
        if not values["mixture"]:
            raise UserError(f"{path.name}: mixture is empty; list at least one {{data: ..., weight: ...}}.")
    return DataRecipe(**values, folder=path.parent, notes=_notes(name_or_path, path))


def _notes(name: str, path: Path) -> tuple[str, ...]:
    """What a user should know who may have meant something else by a name."""
    if Path(name).suffix in (".yaml", ".yml"):
        return ()
    if path.parent.name == Path(name).name and path.name == "data.yaml":
        return (f"{name} is read by the data recipe in it, data.yaml.",)
    if Path(name).exists():
        return (f"{name} is read as the data recipe of this name, and not as {name} here; for that write ./{name}.",)
    return ()


def _values(raw: Mapping[str, Any], cls: type, what: str) -> dict[str, Any]:
    """What a YAML mapping gives for a dataclass. Raises UserError for unknown keys, wrong types and missing ones."""
    fields = {f.name: f for f in dataclasses.fields(cls) if "yaml" in f.metadata}
    _known(raw, tuple(fields), what)
    values = {key: _read_as(value, fields[key].metadata["yaml"]) for key, value in raw.items()}
    for key, value in values.items():
        kind = fields[key].metadata["yaml"]
        if value is None and (kind is int or fields[key].default is None):
            continue
        number = kind is float and isinstance(value, int)
        if not (isinstance(value, kind) or number) or (isinstance(value, bool) and kind is not bool):
            quote = f"; to mean the text, write {key}: '{value}'" if kind is str and _is_scalar(value) else ""
            raise UserError(
                f"{what}: {key} is {value!r}, but must be {_KINDS[kind]}{quote}. {fields[key].metadata['help']}"
            )
    return values


def _read_as(value: Any, kind: type) -> Any:
    """A value where a recipe needs this kind: text stays as it was written, a number is what YAML reads."""
    if isinstance(value, AsWritten):
        return value.value if kind in (int, float, bool) else str(value)
    if isinstance(value, dict):
        # What stands in mappings and lists is text, such as names of columns, or is checked where it is used.
        return {key: _read_as(one, dict) for key, one in value.items()}
    return [_read_as(one, list) for one in value] if isinstance(value, list) else value


def _is_scalar(value: Any) -> bool:
    return isinstance(value, bool | int | float)


def _known(raw: Mapping[str, Any], keys: Sequence[str], what: str) -> None:
    for key in raw:
        if key not in keys:
            raise UserError(
                f"{what}: unknown key {key!r}; did you mean {nearest(key, keys)!r}? The keys are {', '.join(keys)}."
            )


def _column(ours: str, theirs: Any, what: str) -> str | MessagesColumn | TurnColumns:
    if isinstance(theirs, str):
        # `messages: column` is short for one whose keys are role and content already.
        return MessagesColumn(theirs) if ours == "messages" and not is_template(theirs) else theirs
    if isinstance(theirs, dict) and {"user", "assistant"} <= theirs.keys():
        return TurnColumns(**_values(theirs, TurnColumns, f"{what}: columns.{ours}"))
    if not isinstance(theirs, dict) or "column" not in theirs:
        quote = f" To mean a column of this name, write '{theirs}'." if _is_scalar(theirs) else ""
        raise UserError(
            f"{what}: columns.{ours} is {theirs!r}; give the source's column, a '{{column}}' template, "
            "{user: template, assistant: template}, or {column: ..., role_key: ..., content_key: ..., role_map: ...}."
            + quote
        )
    return MessagesColumn(**_values(theirs, MessagesColumn, f"{what}: columns.{ours}"))


def _paths(split: str, files: Any, what: str) -> tuple[str, ...]:
    paths = (files,) if isinstance(files, str) else tuple(files) if isinstance(files, list) else ()
    if not paths or not all(isinstance(path, str) for path in paths):
        raise UserError(f"{what}: data_files.{split} is {files!r}; give a path or a list of paths.")
    return paths


def _part(raw: Any, path: Path, root: Path | None, parents: tuple[Path, ...]) -> MixturePart:
    what = f"{path.name}: mixture"
    if isinstance(raw, dict):
        kinds = {"weight": float, "rows": int}
        raw = {key: _read_as(value, kinds.get(key, str)) for key, value in raw.items()}
    if not isinstance(raw, dict) or not isinstance(raw.get("data"), str):
        raise UserError(f"{what} has {raw!r}; write each part as {{data: name or path, weight: share}}.")
    _known(raw, ("data", "weight", "rows", "domain"), what)
    for key, kind in (("weight", (int, float)), ("rows", int)):
        if key in raw and (not isinstance(raw[key], kind) or isinstance(raw[key], bool)):
            raise UserError(f"{what}: {key} of {raw['data']!r} is {raw[key]!r}, but must be a number.")
    domain = raw.get("domain")
    if domain is not None and (not isinstance(domain, str) or not domain):
        raise UserError(f"{what}: domain of {raw['data']!r} is {domain!r}, but must be a word.")
    recipe = _load(raw["data"], root=root, base=path.parent, parents=parents)
    weight = None if raw.get("weight") is None else float(raw["weight"])
    return MixturePart(data=raw["data"], recipe=recipe, weight=weight, rows=raw.get("rows"), domain=domain)
