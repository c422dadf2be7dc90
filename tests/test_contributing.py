"""CONTRIBUTING says where things are: every file it names is there, and every stop of its walk."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
STOPS = re.findall(r"^\d\. `(mmkd/[\w/]+\.py)`: `(\w+)`", TEXT, re.MULTILINE)


def test_the_walk_to_the_loss_has_at_most_eight_stops():
    assert 1 < len(STOPS) <= 8


@pytest.mark.parametrize(("path", "name"), STOPS)
def test_a_stop_of_the_walk_is_where_it_is_said_to_be(path: str, name: str) -> None:
    assert re.search(rf"^\s*(def|class) {name}\b", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:mmkd|tests|scripts|trainers)/[\w./]+)`", TEXT))))
def test_a_path_that_is_named_is_there(path: str) -> None:
    assert (ROOT / path).exists()
