"""Warnings about types that another program has guessed: the text in the original file cannot be recovered."""

import logging
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Value

from .columns import TurnColumns, is_template, template_columns
from .data_recipe import BUILDERS, DataRecipe

logger = logging.getLogger(__name__)

_LOST = {
    "csv": "reads None, NA and null as missing values and 02139 as 2139",
    "json": "reads text that looks like a date as a date, and changes how numbers are written",
}


def warn_guessed_types(recipe: DataRecipe, raw: Dataset) -> None:
    """Warns about columns in templates whose values may differ from the text in their files."""
    kind = raw.info.builder_name
    if recipe.source not in BUILDERS and kind in _LOST:
        guessed = _guessed(raw)
        if kind == "csv" or guessed:
            logger.warning(
                "%s: %s holds %s files, and their reader on the Hub %s%s. To have rows as written, download the files "
                "and set `source: %s` with `data_files:`.",
                *(recipe.name, recipe.source, kind, _LOST[kind], f" ({', '.join(guessed)})" if guessed else "", kind),
            )
    # Our own reader of JSON gives 1.0 only where the file has 1.0.
    for column in _filled_by_name(recipe) if recipe.source != "json" else ():
        if raw.features[column] in (Value("float64"), Value("float32")) and _are_whole_but_for_nulls(raw, column):
            logger.warning(
                "%s: column %s holds whole numbers as 1.0, as pandas keeps them where some are missing. A template "
                "with {%s} writes 1.0; write {%s:.0f} for 1.",
                *(recipe.name, column, column, column),
            )


def _guessed(raw: Dataset) -> list[str]:
    kinds = ("timestamp", "date", "float", "time")
    return [name for name, feature in raw.features.items() if str(getattr(feature, "dtype", "")).startswith(kinds)]


def _filled_by_name(recipe: DataRecipe) -> list[str]:
    """The columns that templates use without a format such as {n:.0f}."""
    templates = []
    for theirs in recipe.columns.values():
        if isinstance(theirs, TurnColumns):
            templates += [theirs.user, theirs.assistant]
        elif isinstance(theirs, str) and is_template(theirs):
            templates.append(theirs)
    names = [name for template in templates for name in template_columns(template) if f"{{{name}}}" in template]
    return list(dict.fromkeys(names))


def _are_whole_but_for_nulls(raw: Dataset, column: str) -> bool:
    nulls = False
    tables: Any = raw.select_columns([column]).with_format("arrow").iter(batch_size=100_000)
    for table in tables:
        values = table.column(column)
        nulls |= values.null_count > 0
        if not pc.call_function(
            "all", [pc.call_function("equal", [values, pc.call_function("floor", [values])])]
        ).as_py():
            return False
    return nulls
