"""Every command and every block of code in the documentation works, as it stands there."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmkd.precision import NATIVE_BF16
from tests.docs.page_blocks import read_page
from tests.docs.page_runner import ROOT, PageRunner
from tests.docs.page_stand_ins import make_stand_ins

PAGES = [*sorted(ROOT.glob("docs/**/*.md")), ROOT / "README.md"]
CARDS = [
    *sorted(ROOT.glob("trainers/*/README.md")),
    ROOT / "CONTRIBUTING.md",
    ROOT / "eval" / "README.md",
    ROOT / "scripts" / "bench" / "README.md",
]
"""Pages about runs of hours or about the house: what they show is checked and not run."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parameter(path: Path) -> object:
    marks = [pytest.mark.slow] if read_page(path).settings.get("slow") else []
    return pytest.param(path, id=name_of(path), marks=marks)


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in, which is the current one, and the commands of mmkd for bash."""
    folder, commands = tmp_path / "work", tmp_path / "bin"
    for made in (folder, commands):
        made.mkdir()
    for name, words in (("mmkd", ""), ("mmkd-train", " train")):
        script = commands / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mmkd.commands.main{words} "$@"\n')
        script.chmod(0o755)
    (commands / "python").symlink_to(sys.executable)
    monkeypatch.chdir(folder)
    # Recipes set variables; each page begins with those of the machine, and computes in float32 as most of them do.
    before = dict(os.environ)
    os.environ.update({NATIVE_BF16: "0", "MMKD_PAGE_COMMANDS": str(commands), "WANDB_MODE": "offline"})
    yield folder
    os.environ.clear()
    os.environ.update(before)
    sys.modules.pop("page", None)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("path", [parameter(path) for path in PAGES])
def test_a_page_works_from_top_to_bottom(path: Path, reader: Path) -> None:
    make_stand_ins(path.read_text(encoding="utf-8"), reader)
    PageRunner(name_of(path), read_page(path)).play()


@pytest.mark.parametrize("path", [parameter(path) for path in CARDS])
def test_commands_of_a_card_exist(path: Path, reader: Path) -> None:
    PageRunner(name_of(path), read_page(path), run=False).play()
