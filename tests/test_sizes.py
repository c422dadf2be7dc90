"""Functions, classes and files stay short enough to be read at once; file names tell files apart."""

import ast
from collections import Counter
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).resolve().parents[1] / "mmkd").rglob("*.py"))
FUNCTION, CLASS, FILE = 60, 250, 400
"""Lines."""


def lengths(source: str) -> dict[str, int]:
    """The lines of each function and class that has too many, and of the file."""
    tree = ast.parse(source)
    limits = {ast.FunctionDef: FUNCTION, ast.AsyncFunctionDef: FUNCTION, ast.ClassDef: CLASS}
    lines = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.end_lineno is not None
        if node.end_lineno - node.lineno + 1 > limits[type(node)]
    }
    return lines | ({"the file": source.count("\n")} if source.count("\n") > FILE else {})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_is_too_long(path: Path) -> None:
    assert lengths(path.read_text(encoding="utf-8")) == {}


def test_what_is_too_long_is_found() -> None:
    assert lengths("def f():\n" + "    pass\n" * 60) == {"f": 61}
    assert lengths("class C:\n" + "    a = 1\n" * 250) == {"C": 251}
    assert lengths("a = 1\n" * 401) == {"the file": 401}


def test_a_file_is_found_by_its_name() -> None:
    names = Counter(path.name for path in FILES if path.name != "__init__.py")
    assert [name for name, count in names.items() if count > 1] == []
