"""What reads models outside of training, where they are on a pretended GPU."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from mmkd.commands.main import main
from tests.pretended_cuda import pretended_cuda
from tests.teachers.caches import build_cache, contents, write_recipe


@pytest.mark.parametrize(
    "keys",
    [
        {"teacher_top_k": 8, "cache_tail_draws": 8},
        {"method": "alm", "chunks": "all"},
        {"cache_job": "generate", "cache_samples": 2, "cache_max_new_tokens": 8},
    ],
    ids=lambda keys: str(next(iter(keys.values()))),
)
def test_a_teacher_answers_for_a_cache(
    keys: dict[str, Any], completions: Dataset, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = [] if "cache_job" not in keys else ["--job", keys["cache_job"]]
    keys = {key: value for key, value in keys.items() if key != "cache_job"}
    recipe = write_recipe(tmp_path / "recipe", tiny, {"train": completions}, **keys)
    folders = [tmp_path / "here", tmp_path / "there"]
    flags = [*job, "--teacher_cache"]
    build_cache(recipe, *flags, str(folders[0]))
    with pretended_cuda(monkeypatch):
        build_cache(recipe, *flags, str(folders[1]))
    here, there = (contents(folder) for folder in folders)
    assert {name for name in {*here, *there} if here.get(name) != there.get(name)} <= {"manifest.json"}


def test_student_and_teacher_are_measured(
    completions: Dataset, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = write_recipe(tmp_path, tiny, {"train": completions, "eval": completions}).parent / "words.yaml"
    command = ["eval", str(tiny["student"]), "--teacher", str(tiny["teacher"]), "--data", str(data), "--rows", "4"]
    command += ["--dtype", "float32", "--max_new_tokens", "4", "--measures", "generation", "agreement", "calibration"]
    found = []
    assert main([*command, "--device", "cpu", "--output", "here"]) == 0
    with pretended_cuda(monkeypatch):
        assert main([*command, "--output", "there"]) == 0
        assert main([*command, "--device", "cpu", "--output", "back"]) == 0
    for folder in ("here", "there", "back"):
        kept = json.loads(Path(folder, "results.json").read_text())["measures"].values()
        found.append({entry["measure"]: (entry["settings"]["device"], entry["values"]) for entry in kept})
    assert [one["agreement"][0] for one in found] == ["cpu", "cuda", "cpu"]
    for name, (_, values) in found[0].items():
        assert values == found[2][name][1]
        assert str(values)[:60] == str(found[1][name][1])[:60]
