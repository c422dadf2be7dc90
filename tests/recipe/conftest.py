"""Keys that tests of recipes change."""

from pathlib import Path
from typing import Any

import pytest

from scripts.make_tiny_models import sentences


@pytest.fixture
def keys(tiny: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    """Of a run of the tiny student over some text, taught by what it was."""
    rows = tmp_path / "rows.txt"
    rows.write_text("\n".join(sentences(12)))
    return {
        "method": "kd",
        "student": str(tiny["student"]),
        "teacher": "self",
        "data": str(rows),
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "max_length": 32,
        "report_to": "none",
    }
