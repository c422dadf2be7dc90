"""Functions of the user's own that a recipe names."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmkd.errors import UserError


def user_function(name: str, key: str) -> Callable[..., Any]:
    """The function that `key` names as package.module:function, or as path/to/file.py:function.

    Modules are looked for in the current folder, too. The code runs as the user's own. Raises UserError where there is
    no such function.
    """
    place, _, function = name.rpartition(":")
    if not place or not function:
        raise UserError(f"{key} is {name!r}; write package.module:function, or path/to/file.py:function.")
    module = _file(Path(place), key) if place.endswith(".py") else _module(place, key)
    value = getattr(module, function, None)
    if not callable(value):
        names = ", ".join(own for own in vars(module) if callable(getattr(module, own)) and not own.startswith("_"))
        raise UserError(f"{key}: {place} has no function {function!r}; it has {names or 'none'}.")
    return value


def _file(path: Path, key: str) -> Any:
    if not path.is_file():
        raise UserError(f"{key}: there is no file {path}.")
    name = f"mmkd_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Functions of it can then be sent to other processes.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _module(name: str, key: str) -> Any:
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A module that is there and lacks a package of its own tells that itself.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise UserError(
            f"{key}: there is no module {name!r}, neither installed nor in the current folder. Correct the name, or "
            "give the path of a file: path/to/file.py:function."
        ) from error
    finally:
        if added:
            sys.path.remove(here)
