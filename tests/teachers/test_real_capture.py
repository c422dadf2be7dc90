"""Caches and answers of a teacher behind a real vLLM, beside those of the same teacher in this process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml

from mmkd.cache.store import Cache
from mmkd.commands.main import main
from scripts.make_tiny_models import sentences
from tests.teachers.conftest import Served
from tests.teachers.vlm import make_image

Build = Callable[..., Path]
# One step of the 8-bit log-probs at 20 nats: a last digit that differs may round to the neighbouring code.
STEP = 0.27


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """`build(teacher, rows, name, key=value, ...)`: the folder of a cache built from rows of messages."""
    monkeypatch.chdir(tmp_path)

    def build(teacher: Path, rows: list[dict[str, Any]], name: str, **keys: Any) -> Path:
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        columns = {column: column for column in rows[0]}
        data = {"name": "rows", "license": "CC0-1.0", "source": "json", "columns": columns}
        (tmp_path / "rows.yaml").write_text(yaml.safe_dump({**data, "data_files": {"train": "rows.jsonl"}}))
        recipe = {
            "method": "kd",
            "student": str(teacher),
            "teacher": str(teacher),
            "data": "rows.yaml",
            "output_dir": "run",
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "bf16": False,
            "max_length": 200,
            "learning_rate": 1e-6,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "teacher_top_k": 16,
            "cache_shard_rows": 5,
        }
        recipe |= {"teacher_cache": name, **keys}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        assert main(["cache", "build", "recipe.yaml"]) == 0
        return tmp_path / name

    return build


def chats(count: int, pictures: Path | None = None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(zip(sentences(count, seed=3), sentences(count, seed=4), strict=True)):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages})
        if pictures is not None:
            path = pictures / f"{number}.png"
            make_image(number, 64, 64 if number % 2 else 48).save(path)
            rows[-1]["images"] = [str(path)]
    return rows


def assert_equal(ours: Path, theirs: Path) -> None:
    left, right = Cache(ours), Cache(theirs)
    assert len(left) == len(right) > 0
    keys = [bytes(key) for table in left._tables for key in table["key"].to_pylist()]
    rows = [(left.find(key), right.find(key)) for key in keys]
    pairs = [(left.scores(a), right.scores(b)) for a, b in rows if a is not None and b is not None]
    assert len(pairs) == len(left)
    same = np.concatenate([(a.ids == b.ids).ravel() for a, b in pairs])
    # A cache of log_probs lists no ids.
    assert same.sum() > 0.99 * len(same) or not len(same)
    assert max(np.abs(a.log_probs - b.log_probs).max() for a, b in pairs) < STEP
    assert np.mean([np.abs(a.log_probs - b.log_probs).mean() for a, b in pairs]) < 1e-3


@pytest.mark.parametrize("signal", ["top_k", "log_probs"])
def test_a_cache_built_through_vllm(served_teacher: Served, build: Build, signal: str) -> None:
    rows = chats(12)
    local = build(served_teacher.folder, rows, "local", cache_signal=signal)
    server = {"teacher_server": [served_teacher.url], "cache_signal": signal}
    assert_equal(local, build(served_teacher.folder, rows, "served", **server))


def test_training_with_a_live_server_and_from_its_cache(served_teacher: Served, build: Build) -> None:
    build(served_teacher.folder, chats(12), "served", teacher_server=[served_teacher.url])

    def losses(*flags: str) -> list[float]:
        assert main(["train", "recipe.yaml", *flags]) == 0
        history = json.loads(Path("run/trainer_state.json").read_text())["log_history"]
        return [entry["loss"] for entry in history if "loss" in entry]

    cached = losses()
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    del recipe["teacher_cache"]
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    # The student is the teacher: nothing but the encoding of the cache is left.
    assert max(cached) < 3e-4
    assert max(losses()) < 1e-5


def test_a_vlm_cache_built_through_vllm(served_vlm: Served, build: Build, tmp_path: Path) -> None:
    rows = chats(8, tmp_path)
    local = build(served_vlm.folder, rows, "local")
    assert_equal(local, build(served_vlm.folder, rows, "served", teacher_server=[served_vlm.url]))
    tables: Any = datasets.load_from_disk(str(tmp_path / "served"))
    assert min(tables["train"]["image_tokens"]) > 0


def test_answers_generated_through_vllm(served_teacher: Served, build: Build) -> None:
    greedy = {"job": "generate", "cache_temperature": 0.0, "cache_max_new_tokens": 16}
    local = build(served_teacher.folder, chats(6), "local", **greedy)
    served = build(served_teacher.folder, chats(6), "served", teacher_server=[served_teacher.url], **greedy)
    tables: Any = [datasets.load_from_disk(str(folder)) for folder in (local, served)]
    left, right = (table["train"] for table in tables)
    assert left["key"] == right["key"]
    assert left["tokens"] == right["tokens"]
    assert left["finish_reason"] == right["finish_reason"]
