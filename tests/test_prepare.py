"""mmkd prepare: what recipes need and no hub gives, listed and made, whole or not at all."""

import gzip
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from mmkd.commands.main import main
from mmkd.prepare import fashion_mnist, packages
from mmkd.prepare.preparations import PREPARATIONS
from mmkd.shipped import KINDS, recipe_root


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_list_says_what_each_is_and_whether_it_is_there(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["prepare", "python_docs"]) == 0
    capsys.readouterr()
    assert main(["prepare"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert PREPARATIONS.keys() <= lines.keys()
    assert lines["python_docs"].split()[-1] == "yes"
    assert lines["easy_vqa_models"].split()[-1] == "no"
    assert "pip install gguf" in lines["gemma-3-270m"]


def test_what_is_there_is_kept(elsewhere: Path, capsys: Any) -> None:
    assert main(["prepare", "python_docs"]) == 0
    path = elsewhere / ".cache" / "mmkd" / "python_docs" / "eval.jsonl"
    before = path.stat().st_mtime_ns
    assert main(["prepare", "python_docs"]) == 0
    assert path.stat().st_mtime_ns == before
    assert "python_docs: .cache/mmkd/python_docs/train.jsonl" in " ".join(capsys.readouterr().out.split())


def test_what_something_needs_is_made_first_and_once(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def stand_in(name: str) -> Any:
        def make(source: Path | None) -> None:
            made.append(name)
            for file in PREPARATIONS[name].files:
                path = elsewhere / ".cache" / "mmkd" / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()

        return make

    for name, one in PREPARATIONS.items():
        monkeypatch.setitem(PREPARATIONS, name, replace(one, make=stand_in(name), packages=()))
    assert main(["prepare", "easy_vqa_models", "easy_vqa", "python_docs"]) == 0
    assert made == ["easy_vqa", "easy_vqa_models", "python_docs"]
    assert main(["prepare", *PREPARATIONS]) == 0
    assert sorted(made) == sorted(PREPARATIONS)


def test_bad_names_and_missing_packages_are_one_line(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["prepare", "easy_vqu"]) == 2
    assert "did you mean 'easy_vqa'?" in capsys.readouterr().err
    monkeypatch.setitem(PREPARATIONS, "gemma-3-270m", replace(PREPARATIONS["gemma-3-270m"], packages=("no_such",)))
    assert main(["prepare", "python_docs", "gemma-3-270m"]) == 2
    assert "is made with no-such, which is not installed: pip install no-such." in capsys.readouterr().err
    assert not Path(".cache").exists()
    assert main(["prepare", "fashion_mnist", "--source", "nowhere"]) == 2
    assert "nowhere lacks train-images-idx3-ubyte.gz: apt-get install" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("/usr/bin/python: No module named pip\n", "Install pip into it (python -m ensurepip)"),
        ("ERROR: No matching distribution found for easy-vqa==1.0\n", "No matching distribution found"),
        ("", "pip ended with status 1"),
    ],
)
def test_a_download_that_fails_is_one_line(
    elsewhere: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, stderr: str, reason: str
) -> None:
    failed = SimpleNamespace(returncode=1, stderr=stderr)
    monkeypatch.setattr(packages.subprocess, "run", lambda *a, **k: failed)
    assert main(["prepare", "easy_vqa"]) == 2
    error = capsys.readouterr().err
    assert "easy-vqa==1.0 cannot be downloaded with pip" in error
    assert reason in error
    assert not PREPARATIONS["easy_vqa"].is_there
    assert not list((elsewhere / ".cache" / "mmkd" / "easy_vqa").iterdir())


def test_another_file_than_the_known_one_is_refused(
    elsewhere: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **kwargs: Any) -> Any:
        (Path(command[command.index("--dest") + 1]) / "easy_vqa-1.0-py3-none-any.whl").write_bytes(b"other")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", run)
    assert main(["prepare", "easy_vqa"]) == 2
    assert "it is not the file that these recipes are for" in capsys.readouterr().err


def test_interrupted_in_the_middle_it_is_not_taken_for_complete(
    elsewhere: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = elsewhere / "source"
    source.mkdir()
    monkeypatch.setattr(fashion_mnist, "SIZES", {"captions": 4, "train": 3, "validation": 2})
    random = np.random.default_rng(0)
    for part in ("train", "t10k"):
        images = random.integers(0, 255, 16 + 10 * 784, dtype=np.uint8)
        (source / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images.tobytes()))
        labels = random.integers(0, 10, 8 + 10, dtype=np.uint8)
        (source / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels.tobytes()))
    plain = fashion_mnist.Dataset.to_parquet

    def interrupted(self: Any, path: str) -> None:
        plain(self, path)
        if "validation" in path:
            raise KeyboardInterrupt

    command = ["prepare", "fashion_mnist", "--source", str(source)]
    with monkeypatch.context() as patch:
        patch.setattr(fashion_mnist.Dataset, "to_parquet", interrupted)
        assert main(command) == 130
    assert "interrupted. What was finished is kept" in capsys.readouterr().err
    folder = elsewhere / ".cache" / "mmkd" / "fashion_mnist"
    assert sorted(path.name for path in folder.glob("*.parquet")) == ["captions.parquet", "train.parquet"]
    assert main(command) == 0
    assert PREPARATIONS["fashion_mnist"].is_there


def test_every_command_that_recipes_name_prepares_something() -> None:
    named = 0
    for kind in KINDS:
        for path in recipe_root(kind).rglob("*.yaml"):
            text = path.read_text()
            for names in re.findall(r"mmkd prepare ((?:[\w.-]+ ?)+)", text):
                names = names.partition(" && ")[0].rstrip(".").split()
                assert set(names) <= PREPARATIONS.keys(), path
                named += 1
            assert "scripts/make_" not in text, path
            assert "scripts/get_" not in text, path
    assert named > 10


def test_what_data_recipes_read_is_what_is_prepared() -> None:
    made = {f".cache/mmkd/{file}" for one in PREPARATIONS.values() for file in one.files}
    for path in recipe_root("data_recipes").rglob("*.yaml"):
        recipe = yaml.safe_load(path.read_text())
        if str(recipe.get("prepare", "")).startswith("mmkd prepare"):
            named = [files if isinstance(files, list) else [files] for files in recipe["data_files"].values()]
            assert {file for files in named for file in files} <= made, path
