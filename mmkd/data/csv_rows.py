"""Rows of CSV and TSV files: every cell is text, exactly as in the file."""

import csv
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
from datasets import Features, Value

from mmkd.errors import UserError

from .json_rows import not_utf8

_BATCH = 10_000
_SEPARATORS = ("\t", ",", ";", "|")
_SPELLED = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars"}


def csv_features(files: Iterable[tuple[str, str]]) -> Features:
    """A text type for each column; `files` are (path, name in messages). Raises UserError for files without rows."""
    columns: list[str] = []
    names, rows = [], 0
    for path, name in files:
        header, *first = [cells for _, cells in zip(range(2), _records(path, name), strict=False)] or [None]
        if header is None:
            raise UserError(f"{name} is empty; its first line must name the columns.")
        rows += len(first)
        if columns and set(header) != set(columns):
            raise UserError(
                f"{name} has the columns {', '.join(header)}, but {names[0]} has {', '.join(columns)}; the files of "
                "one split must have the same columns."
            )
        columns = columns or header
        names.append(name)
    if not rows:
        raise UserError(f"{', '.join(names)}: there are no rows below the names of the columns.")
    return Features({column: Value("string") for column in columns})


def csv_tables(path: str, name: str, features: Features) -> Iterator[pa.Table]:
    """The rows of a file as tables of text. Raises UserError for broken lines."""
    records = _records(path, name)
    header = next(records)
    places = [header.index(column) for column in features]
    batch: list[list[str]] = []

    def table() -> pa.Table:
        columns = [pa.array([cells[place] for cells in batch], pa.string()) for place in places]
        return pa.table(columns, schema=features.arrow_schema)

    for cells in records:
        batch.append(cells)
        if len(batch) == _BATCH:
            yield table()
            batch = []
    if batch:
        yield table()


def _records(path: str, name: str) -> Iterator[list[str]]:
    """The names of the columns, then the cells of each row. Raises UserError for a file that is not a table."""
    # The standard library rejects cells above 128 kB, which long documents exceed.
    csv.field_size_limit(sys.maxsize)
    header: list[str] = []
    end = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = next((line for line in file if line.strip()), "")
            file.seek(0)
            separator = "\t" if Path(name).suffix in (".tsv", ".tab") else _separator(first)
            reader = csv.reader(file, delimiter=separator, strict=True)
            for cells in reader:
                start, end = end + 1, reader.line_num
                if not cells:
                    continue
                if not header:
                    cells = header = _header(cells, name)
                elif len(cells) != len(header):
                    raise UserError(
                        f"{name}, line {start}: {len(cells)} cells, but there are {len(header)} columns "
                        f"({', '.join(header)}), told apart by {_SPELLED[separator]}. Put text that holds one in "
                        'double quotes ("a, b").'
                    )
                yield cells
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(path, name)) from error
    except csv.Error as error:
        raise UserError(
            f"{name}, line {end + 1}: this is no CSV ({error}). A cell in double quotes ends with one, and a quote "
            'within it is written twice ("").'
        ) from error


def _separator(header: str) -> str:
    """The separator in a header: tabs before commas, which may occur in names, then those of spreadsheets."""
    return next((separator for separator in _SEPARATORS if separator in header), ",")


def _header(cells: list[str], name: str) -> list[str]:
    twice = [cell for cell, count in Counter(cells).items() if count > 1]
    if twice:
        raise UserError(f"{name}: two columns are named {twice[0]!r}; rename one.")
    # pandas writes its index without a name.
    return [cell or f"Unnamed: {place}" for place, cell in enumerate(cells)]


def _not_utf8(path: str, name: str) -> str:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return not_utf8(name, number, line[error.start])
    raise AssertionError(f"{name} is UTF-8")
