"""The notebooks run from top to bottom, and hold no outputs in git."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.docs.page_runner import ROOT
from tests.docs.page_stand_ins import make_stand_ins
from tests.helpers import environment

NOTEBOOKS = sorted(ROOT.glob("docs/notebooks/*.ipynb"))


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def test_notebooks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel runs all of them, since most of its time goes into imports; each begins without the others' names."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    for path in NOTEBOOKS:
        make_stand_ins(path.read_text(encoding="utf-8"), tmp_path)
    cells = [cell for path in NOTEBOOKS for cell in [nbformat.v4.new_code_cell("%reset -f"), *read(path).cells]]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = NotebookClient(
        notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    printed = "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))
    assert "all rows: kl" in printed
    ce, dho = (float(printed.split(f"{name}accuracy ")[1][:5]) for name in ("ce   ", "dho  "))
    assert dho > ce


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_outputs_are_not_kept(path: Path) -> None:
    for cell in read(path).cells:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
