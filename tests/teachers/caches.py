"""Recipes and caches of tiny models that several tests build."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from datasets import Dataset
from rich.console import Console

from mmkd.cache.codec import TokenScores
from mmkd.capture.build import build
from mmkd.capture.build_plan import Plan, make_plan
from mmkd.recipe.flags import recipe_of


def write_recipe(folder: Path, tiny: Mapping[str, Path], data: Mapping[str, Dataset], **keys: Any) -> Path:
    """A recipe that distils the tiny models on these rows ("train", and "eval" where given) with a cache beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in data.items():
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    source: dict[str, Any] = {
        "name": "words",
        "license": "CC0-1.0",
        "source": "json",
        "columns": {name: name for name in data["train"].column_names},
        "data_files": {split: f"{split}.jsonl" for split in data},
        "splits": {split: split for split in data},
        "shuffle_seed": None,
    }
    (folder / "words.yaml").write_text(yaml.safe_dump(source))
    defaults: dict[str, Any] = {
        "method": "kd",
        "student": str(tiny["student"]),
        "teacher": str(tiny["teacher"]),
        "data": str(folder / "words.yaml"),
        "output_dir": str(folder / "run"),
        "teacher_cache": str(folder / "cache"),
        "teacher_top_k": 16,
        "cache_shard_rows": 8,
        "max_length": 64,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**defaults, **keys}))
    return recipe


def plan_of(recipe: Path, *flags: str) -> Plan:
    """What `mmkd cache build RECIPE FLAGS` would do."""
    run = recipe_of(str(recipe), flags).parse()
    return make_plan(run)


def build_cache(recipe: Path, *flags: str) -> Path:
    """What `mmkd cache build RECIPE FLAGS` writes."""
    return build(plan_of(recipe, *flags), Console(quiet=True))


def contents(folder: Path, without: Sequence[str] = ("log.jsonl",)) -> dict[str, bytes]:
    """Every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in without)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def random_scores(vocab: int, k: int, m: int, tokens: int = 7, seed: int = 0) -> TokenScores:
    """Any ids, the first and the last one among them, and log-probs that decrease."""
    random = np.random.default_rng(seed)
    ids = np.stack([random.permutation(vocab)[:k] for _ in range(tokens)]) if tokens else np.zeros((0, k))
    draws = random.integers(vocab, size=(tokens, m))
    if k > 1 and tokens:
        ids[0, :2] = [vocab - 1, 0]
    if m > 1 and tokens:
        draws[0, :2] = [vocab - 1, 0]
    mass = -np.sort(-random.random((tokens, k + 1)), axis=1)
    log_probs = np.log(mass / mass.sum(axis=1, keepdims=True)).astype(np.float32)
    tail = log_probs[:, -1] if k else np.zeros(tokens, dtype=np.float32)
    return TokenScores(ids.astype(np.int32), log_probs[:, :k], draws.astype(np.int32), tail)
