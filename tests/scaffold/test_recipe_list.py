"""What ships says what it is for, and `mmkd recipes` shows it."""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from mmkd.commands.main import main
from mmkd.prepare.preparations import PREPARATIONS
from mmkd.scaffold.recipe_list import Entry, entries_with, lines_of, print_blocks
from mmkd.schema_lines import without_schema_line
from mmkd.shipped import KINDS, Summary, find_any, list_recipes, recipe_root, summary_of

EVERYTHING = [(kind, name) for kind in KINDS for name in list_recipes(kind)]
RECIPES = list_recipes("trainers")


@pytest.mark.parametrize(("kind", "name"), EVERYTHING, ids="/".join)
def test_everything_that_ships_says_what_it_is_for(kind: str, name: str) -> None:
    purpose = summary_of(name, kind).purpose
    assert re.match(r"[A-Z].*[.]$", purpose), purpose
    assert len(purpose) < 330


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_which_hardware_it_needs(name: str) -> None:
    assert re.fullmatch(
        r"CPU, \w+ minutes on two cores|CPU, minutes on two cores|1 GPU of \d+ GB|\d+ GPUs of \d+ GB",
        summary_of(name).hardware,
    )


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_names_the_preparations_and_trainings_that_it_reads(name: str) -> None:
    """Followed through the recipes that have to be trained first."""
    text = (recipe_root("trainers") / name).read_text()
    shipped = list_recipes("data_recipes")
    files_of_data = [f"{data}.yaml" for data in re.findall(r"data: ([\w/-]+)", text)]
    data = [recipe_root("data_recipes") / file for file in files_of_data if file in shipped]
    paths = {
        path
        for body in [text, *(file.read_text() for file in data)]
        for path in re.findall(r"\.cache/mmkd/([\w./-]+)", body)
    }
    commands = [command for recipe in (name, *trained_first(name)) for command in summary_of(recipe).first]
    prepared = {word for command in commands if command.startswith("mmkd prepare") for word in command.split()[2:]}
    assert prepared <= PREPARATIONS.keys()
    files = {
        file for word in prepared for need in (word, *PREPARATIONS[word].needs) for file in PREPARATIONS[need].files
    }
    made = {path for command in commands for path in re.findall(r"\.cache/mmkd/([\w./-]+)", command)}
    for path in paths - made:
        assert any(file == path or file.startswith(f"{path}/") for file in files), (
            f"{path} is made by no first command"
        )


def trained_first(name: str) -> list[str]:
    words = [command.split() for command in summary_of(name).first]
    names = [f"{parts[1]}.yaml" for parts in words if parts[0] == "mmkd-train"]
    assert set(names) <= set(RECIPES)
    return names


def test_the_header_is_read_past_a_schema_line_and_free_comments(tmp_path, monkeypatch) -> None:
    text = "# yaml-language-server: $schema=x.json\n# purpose: Long\n#   and on.\n# hardware: CPU\n#\n#   free\n"
    text += "# first: a\n# first: b\nmethod: kd  # purpose: not this\n# first: not this\n"
    (tmp_path / "trainers").mkdir()
    (tmp_path / "trainers" / "x.yaml").write_text(text)
    monkeypatch.setattr("mmkd.shipped._PACKAGE", tmp_path / "mmkd")
    assert summary_of("x.yaml") == Summary("Long and on.", "CPU", ("a", "b"))


def test_words_choose_among_recipes(capsys) -> None:
    assert main(["recipes", "ls", "trainers/alm", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("trainers/alm/") and "  CPU " in line for line in lines)
    assert "First: mmkd prepare SmolLM2-135M-Instruct gemma-3-270m python_docs" in lines[0]
    assert main(["recipes", "ls", "alm", "nowhere"]) == 2
    assert "No recipe has the words alm nowhere" in capsys.readouterr().err


def test_a_terminal_of_80_columns_shows_all_of_it() -> None:
    console = Console(file=io.StringIO(), width=80)
    print_blocks(entries_with([]), console)
    lines = console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
    assert max(map(len, lines)) <= 80
    shown = " ".join(" ".join(lines).split())
    for entry in entries_with([]):
        assert entry.short_name in shown
        assert entry.summary.purpose in shown


def test_a_pipe_gets_a_line_for_each() -> None:
    entries = [Entry("trainers", "kd/a.yaml", Summary("A.", "CPU, minutes on two cores", ("x",)))]
    assert [*lines_of(entries)] == ["trainers/kd/a.yaml  CPU               A.  First: x"]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("kd/quickstart", "trainers/kd/quickstart.yaml"),
        ("gsm8k", "data_recipes/gsm8k.yaml"),
        ("classification/dtd.yaml", "data_recipes/classification/dtd.yaml"),
        ("math", "eval/suites/math.yaml"),
        ("eval/suites/math.yaml", "eval/suites/math.yaml"),
    ],
)
def test_recipes_show_and_cp_find_every_kind(tmp_path, monkeypatch, capsys, name: str, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    text = (recipe_root("trainers").parent / path).read_text()
    assert main(["recipes", "show", name]) == 0
    assert capsys.readouterr().out == text
    assert main(["recipes", "cp", name, "mine.yaml"]) == 0
    # But for the place of its schema.
    assert without_schema_line(Path("mine.yaml").read_text()) == without_schema_line(text)
    assert main(["recipes", "show", "mine.yaml"]) == 0


def test_a_folder_of_the_same_name_hides_no_recipe(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gsm8k").mkdir()
    assert find_any("gsm8k").name == "gsm8k.yaml"
    Path("empty").mkdir()
    assert main(["recipes", "show", "empty"]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert main(["recipes", "show", "gsm8"]) == 2
    assert "nearest is 'gsm8k.yaml'" in capsys.readouterr().err


def test_recipes_ls_does_not_wait_for_torch() -> None:
    program = "import sys; from mmkd.commands.main import main; main(['recipes', 'ls']); "
    program += "print(*[name for name in ('torch', 'transformers', 'trl', 'datasets') if name in sys.modules], 'end')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "end", done.stdout


def test_names_of_kinds_do_not_hide_each_other() -> None:
    names = [name for _, name in EVERYTHING]
    assert len({*names}) == len(names)


def test_headers_hold_no_key_of_the_run() -> None:
    for name in RECIPES:
        keys = yaml.safe_load((recipe_root("trainers") / name).read_text())
        assert not keys.keys() & {"purpose", "hardware", "first"}
