"""The first line of a YAML file, which names the JSON Schema by which editors complete and check its keys."""

import os
import re
from pathlib import Path
from typing import Literal, get_args

SchemaKind = Literal["recipe", "data_recipe", "class_data_recipe"]
"""What a YAML file is: a recipe of a run, of rows to learn from, or of rows with one class each."""

SCHEMAS = Path(__file__).resolve().parent / "_schemas"
"""The folder of JSON Schemas; `scripts/make_schemas.py` writes them."""

_SCHEMA_MARK = "# yaml-language-server: $schema="


def schema_line(kind: SchemaKind, for_path: Path | str) -> str:
    """The first line of a YAML file that will stand at a path, by which editors complete and check its keys.

    It names the schema of the installed mmkd, so that the keys are those that this mmkd knows. The path is relative
    where file and mmkd are under the current folder, as in a checkout or beside a project's `.venv`: the folder may
    then be moved. Otherwise it is absolute, and no path of this machine belongs in a file that is published:
    `without_schema_line` takes it out.
    """
    schema, here = SCHEMAS / f"{kind}.schema.json", Path.cwd()
    folder = Path(for_path).absolute().parent
    if schema.is_relative_to(here) and folder.resolve().is_relative_to(here):
        place = Path(os.path.relpath(schema, folder.resolve())).as_posix()
    else:
        place = str(schema)
    # The line ends at a space.
    return f"{_SCHEMA_MARK}{place if ' ' not in place else schema.as_uri()}\n"


def moved_schema_line(text: str, to_path: Path | str) -> str:
    """The text of a YAML file as it is at another path: its schema, where it names one, is the installed mmkd's."""
    named = re.match(rf"{re.escape(_SCHEMA_MARK)}\S*?(\w+)\.schema\.json\r?\n", text)
    kind = None if named is None else next((kind for kind in get_args(SchemaKind) if kind == named[1]), None)
    return text if kind is None else schema_line(kind, to_path) + without_schema_line(text)


def without_schema_line(text: str) -> str:
    """The text of a YAML file without the line that names its schema."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith(_SCHEMA_MARK))
