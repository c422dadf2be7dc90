"""Rows of JSON and JSON Lines files with the types in the file: text is never read as a date or a number."""

import codecs
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.json as paj
from datasets import Features, Json, List, Value

from mmkd.errors import UserError

# The number of bytes of a file whose rows become one table.
_BLOCK = 8 << 20
_INT64 = range(-(1 << 63), 1 << 63)
_HALF = "half of a character (\\ud800 to \\udfff) is no text; write the whole character."


class WrittenNumber(float):
    """A number that Python would write differently, such as 1e5 or 2.50; `str` gives the original text."""

    text: str

    def __new__(cls, text: str) -> "WrittenNumber":
        """The number that a text denotes."""
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text

    def __format__(self, spec: str) -> str:
        return super().__format__(spec) if spec else self.text


class _DuplicateJSONKey(Exception):
    """An object has the same key twice; a parser would silently keep the last."""


def parse_json(text: str) -> Any:
    """The value of a JSON text; numbers keep their spelling. Raises JSONDecodeError for other text."""
    return _DECODER.decode(text)


def json_text(value: Any) -> str:
    """A value as JSON text, with numbers in their original spelling."""
    if isinstance(value, WrittenNumber):
        return value.text
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json_text(str(key))}: {json_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(json_text, value)) + "]"
    return json.dumps(value, ensure_ascii=False, default=str)


def json_features(files: Iterable[tuple[str, str]]) -> Features:
    """The types of all rows; `files` are (path, name in messages). Raises UserError for broken or empty files."""
    shape, names = Shape(), []
    for path, name in files:
        names.append(name)
        for block in _blocks(path, name):
            for _, row in block:
                shape.see(row)
    if not shape.fields:
        raise UserError(
            f"{', '.join(names)}: there are no rows in it; write one JSON object a line, or a list of them."
        )
    return Features({name: field.feature() for name, field in shape.fields.items()})


def json_tables(path: str, name: str, features: Features) -> Iterator[pa.Table]:
    """The rows of a file as tables of these types. Raises UserError as `json_features` does."""
    schema = Features({key: _stored(feature) for key, feature in features.items()}).arrow_schema
    if all(_encoder(feature) is None for feature in features.values()) and not _is_one_value(path):
        # Arrow is several times as fast, and with a schema it does not guess types.
        for _, lines in _blocks_of_lines(path):
            yield _read_by_arrow(b"".join(lines), schema, name)
        return
    for block in _blocks(path, name):
        yield rows_table(block, name, features)


def rows_table(block: list[tuple[str, dict[str, Any]]], name: str, features: Features) -> pa.Table:
    """Rows, each with its position in the file `name`, as a table of these types.

    Raises UserError for text that is half of a character.
    """
    schema = Features({key: _stored(feature) for key, feature in features.items()}).arrow_schema
    encoders = {key: encode for key, feature in features.items() if (encode := _encoder(feature)) is not None}
    rows = [row for _, row in block]
    for key, encode in encoders.items():
        rows = [{**row, key: encode(row[key])} if key in row else row for row in rows]
    try:
        table = pa.Table.from_pylist(rows, schema=schema)
    except UnicodeEncodeError as error:
        where = next(where for where, row in block if not _is_text(row))
        raise UserError(f"{name}, {where}: {_HALF}") from error
    # Not `table_cast` of `datasets`, which treats numbers beyond 64 bits as invalid JSON and quotes them.
    return table.cast(features.arrow_schema)


def _read_by_arrow(block: bytes, schema: pa.Schema, name: str) -> pa.Table:
    options = paj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error")
    try:
        table = paj.read_json(io.BytesIO(block), paj.ReadOptions(block_size=len(block) + 1), options)
    except pa.ArrowInvalid as error:
        # `json_features` has parsed the file in Python, which accepts nothing but lone surrogates that Arrow rejects.
        raise UserError(f"{name}: {_HALF}") from error
    return table.select(schema.names).cast(schema)


def _number(text: str) -> float:
    value = float(text)
    return value if repr(value) == text else WrittenNumber(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateJSONKey(next(key for key in keys if keys.count(key) > 1))
    return value


_DECODER = json.JSONDecoder(parse_float=_number, parse_constant=WrittenNumber, object_pairs_hook=_object)


def _blocks(path: str, name: str) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Blocks of rows of a file, each with its position. Raises UserError for a row that is not an object."""
    if _is_one_value(path):
        with open(path, "rb") as file:
            yield _whole(file.read().removeprefix(codecs.BOM_UTF8), name)
        return
    for start, lines in _blocks_of_lines(path):
        block = []
        for number, line in enumerate(lines, start):
            if not line.isspace():
                where = f"line {number}"
                # Without the line end, as an error at the end of the text would be reported for the next line.
                text = decoded_text(line, name, number).rstrip("\r\n")
                block.append((where, _row(parsed_text(text, name, number), name, where)))
        yield block


def _blocks_of_lines(path: str) -> Iterator[tuple[int, list[bytes]]]:
    """The lines of a file in blocks, each with the number of its first line, from 1."""
    with open(path, "rb") as file:
        if file.read(3) != codecs.BOM_UTF8:
            file.seek(0)
        number = 1
        while lines := file.readlines(_BLOCK):
            yield number, lines
            number += len(lines)


def _is_one_value(path: str) -> bool:
    """Whether a file holds one list or object rather than one object a line."""
    _, lines = next(_blocks_of_lines(path), (1, []))
    first = next((line.strip() for line in lines if not line.isspace()), b"")
    if first.startswith(b"["):
        return True
    try:
        json.loads(first)
    except ValueError as error:
        # The object continues on the next lines: the file is one object, or broken. Parsing it as a whole decides.
        return (
            first.startswith(b"{")
            and len(lines) > 1
            and getattr(error, "pos", 0) >= len(first.decode(errors="ignore"))
        )
    return False


def _whole(content: bytes, name: str) -> list[tuple[str, dict[str, Any]]]:
    value = parsed_text(decoded_text(content, name), name)
    rows = value if isinstance(value, list) else [value]
    # A list of strings is read as rows of text.
    rows = [{"text": row} if isinstance(row, str) else row for row in rows]
    return [(f"row {number}", _row(row, name, f"row {number}")) for number, row in enumerate(rows)]


def decoded_text(content: bytes, name: str, line: int | None = None) -> str:
    """The text of UTF-8. Raises UserError for other bytes, with the line in the file `name`."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1 if line is None else line
        raise UserError(not_utf8(name, line, content[error.start])) from error


def not_utf8(name: str, line: int, byte: int) -> str:
    """The message about a byte that is not UTF-8."""
    # The byte order mark of UTF-16 begins with one of these two.
    kind = "UTF-16" if line == 1 and byte in (0xFE, 0xFF) else "LATIN1"
    return (
        f"{name}, line {line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8 (`iconv -f {kind} -t UTF-8 "
        f"{name}`, if it is {kind})."
    )


def parsed_text(text: str, name: str, line: int = 1) -> Any:
    """The value of a JSON text that begins in this line of the file `name`. Raises UserError for other text."""
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        where = f"{name}, line {line + error.lineno - 1}, column {error.colno}"
        comma = re.search(r",\s*$", text[: error.pos]) and text[error.pos : error.pos + 1] in ("]", "}")
        # Newer versions of Python point to the comma itself.
        comma = comma or re.match(r",\s*[\]}]", text[error.pos :])
        problem = "a comma before the closing bracket" if comma else error.msg
        raise UserError(f"{where}: this is no JSON ({problem}); correct the line, or remove it.") from error
    except _DuplicateJSONKey as error:
        raise UserError(
            f"{name}, line {line}: the key {str(error)!r} stands twice in one object; remove one."
        ) from error
    except RecursionError as error:
        raise UserError(f"{name}, line {line}: lists and objects are nested too deeply.") from error


def _row(value: Any, name: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = {list: "a list", str: "text", type(None): "null", bool: "true or false"}.get(type(value), "a number")
        raise UserError(f'{name}, {where}: a row is an object such as {{"text": ...}}, and this is {kind}.')
    return value


def _is_text(row: Any) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


class Shape:
    """The kinds of values at one place of all rows, with the shapes of list items and object fields."""

    __slots__ = ("fields", "holds_null", "inside", "kinds", "ragged")

    def __init__(self) -> None:
        self.kinds: set[type] = set()
        self.fields: dict[str, Shape] = {}
        self.inside: Shape | None = None
        self.ragged = False
        self.holds_null = False

    def see(self, value: Any) -> None:
        """Adds the kind of a value."""
        if value is None:
            return
        kind = type(value)
        if kind is dict:
            if dict in self.kinds and value.keys() != self.fields.keys():
                self.ragged = True
            for key, item in value.items():
                if key not in self.fields:
                    self.fields[key] = Shape()
                self.fields[key].see(item)
        elif kind is list:
            self.inside = self.inside or Shape()
            for item in value:
                self.inside.see(item)
            self.inside.holds_null |= None in value
        elif kind is int and value not in _INT64:
            # Arrow has no integer type for it, and a float would change the number.
            kind = WrittenNumber
        self.kinds.add(kind)

    def feature(self, in_list: bool = False) -> Any:
        """The type of `datasets`, or JSON where any type would change a value (objects with different keys)."""
        if not self.kinds:
            # Arrow makes arrays that are too short of fields of type null in a list, as it reads and as it casts.
            return Value("string" if in_list else "null")
        if len(self.kinds) > 1:
            return Json()
        (kind,) = self.kinds
        if kind is dict:
            whole = self.fields and not self.ragged
            return {key: field.feature(in_list) for key, field in self.fields.items()} if whole else Json()
        if kind is list:
            assert self.inside is not None
            if self.inside.holds_null and not self.inside.kinds:
                # Arrow builds invalid arrays from lists that hold only null.
                return Json()
            return List(self.inside.feature(bool(self.inside.kinds)))
        names = {str: "string", bool: "bool", int: "int64", float: "float64"}
        return Value(names[kind]) if kind in names else Json()


def _stored(feature: Any) -> Any:
    if isinstance(feature, Json):
        return Value("string")
    if isinstance(feature, List):
        return List(_stored(feature.feature))
    return {key: _stored(inner) for key, inner in feature.items()} if isinstance(feature, dict) else feature


def _encoder(feature: Any) -> Callable[[Any], Any] | None:
    """The function that encodes JSON inside values of a type, or None if the type has no JSON."""
    if isinstance(feature, Json):
        return lambda value: None if value is None else json_text(value)
    if isinstance(feature, List):
        inside = _encoder(feature.feature)
        return None if inside is None else lambda value: None if value is None else [inside(item) for item in value]
    if isinstance(feature, dict):
        fields = {key: encode for key, item in feature.items() if (encode := _encoder(item)) is not None}
        if fields:
            return lambda value: (
                None if value is None else value | {key: encode(value.get(key)) for key, encode in fields.items()}
            )
    return None
