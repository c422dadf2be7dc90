"""The order in which pytest-xdist's workers take files of tests."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

from tests.schedule import LONGEST, FilesTogether, put_long_files_first

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", LONGEST)
def test_long_files_are_there(name: str) -> None:
    assert (ROOT / name).is_file()


def test_long_files_come_first_and_then_those_of_many_tests() -> None:
    names = ["tests/a.py::test_1", "tests/b.py::test_1", "tests/b.py::test_2", f"{LONGEST[1]}::test_1"]
    items: Any = [SimpleNamespace(nodeid=name) for name in [*names, f"{LONGEST[0]}::test_1"]]
    expected = [f"{LONGEST[0]}::test_1", f"{LONGEST[1]}::test_1", *names[1:3], names[0]]
    put_long_files_first(items)
    assert [item.nodeid for item in items] == expected


def test_servers_are_started_by_one_worker() -> None:
    scheduler: Any = FilesTogether.__new__(FilesTogether)
    split = scheduler._split_scope
    assert split("tests/teachers/test_real_vllm.py::test_1") == split("tests/teachers/test_real_capture.py::test_2")
    assert split("tests/test_cli.py::test_1") == "tests/test_cli.py"
    # It is private: without it, the override would do nothing.
    assert hasattr(LoadFileScheduling, "_split_scope")
