"""From one's own data to a student and its report, in three commands on a terminal and without writing YAML."""

import sys
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("Windows has no pseudo-terminals", allow_module_level=True)

from tests.scaffold.played import Played

QUICK = ("--max_steps", "2", "--logging_steps", "1")


@pytest.mark.parametrize(
    ("data", "teacher", "student"),
    [("chats.jsonl", "teacher", "prune"), ("vqa.json", "large_vlm", "small_vlm"), ("classes", "clip", "vit")],
)
def test_a_student_of_own_data(
    workplace: Path, models: dict[str, Path], data: str, teacher: str, student: str
) -> None:
    who = ("--teacher", str(models[teacher]), "--student", str(models.get(student, student)))
    commands = (
        ("init", "mine.yaml", "--data", data, *who, "--gpu", "none", "--yes"),
        ("train", "mine.yaml", *QUICK),
        ("report", "runs/mine"),
    )
    screens = []
    for words in commands:
        with Played(workplace, *words) as terminal:
            status = terminal.end()
            screens.append(terminal.lines)
        shown = "\n".join(screens[-1]).rstrip()
        # For whoever wants to look.
        with (workplace / "screens.txt").open("a") as file:
            file.write(f"$ mmkd {' '.join(words)}\n{shown}\n\n")
        assert status == 0, shown
        assert "Traceback" not in shown
        assert max(map(len, screens[-1])) <= 80
    assert "Sound: 0 problems" in " ".join(screens[0])
    assert [path.name for path in Path("runs/mine").glob("*.safetensors")] == ["model.safetensors"]
    page = Path("runs/mine/report.html").read_text()
    assert data in page
