"""Models that trainers of several methods share, and what two ranks saw of them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from huggingface_hub.utils import WeakFileLock

from mmkd.methods.tower_kd.tower_config import TERMS
from scripts.make_tiny_models import make_model, make_tokenizer, save, sentences
from tests.alignment.tiny_tokenizers import CHATTERS
from tests.classes import BATCH_TERMS
from tests.experts import experts
from tests.forked import on_two_ranks
from tests.helpers import LORA, tuned
from tests.pairs import ADAPTER, EVERY_TERM, MASKED, ORDERS, SCORED, cached_teacher
from tests.vlms import make_llava

FEATURES: list[dict[str, Any]] = [
    {"student": "layers.0", "teacher": "layers.1", "weight": 0.5, "name": "middle"},
    {"student": "last_hidden", "kind": "relation"},
    {"student": "every_2nd", "kind": "mse", "tokens": "all"},
]
"""Terms of `features` of tokens and of rows, with projectors and without."""


@pytest.fixture
def routed() -> Dataset:
    """Rows for teachers `a` and `b`, not in turns, so that some micro-batches have one of them only."""
    names = ["a" if row % 5 in (0, 1, 4) else "b" for row in range(24)]
    completions = [f" {text}" for text in sentences(24, seed=4)]
    return Dataset.from_dict({"prompt": sentences(24, seed=3), "completion": completions, "domain": names})


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher that reads with a SentencePiece-like tokenizer and a chat template of its own."""
    # One folder for all workers, since `ranks` runs once for them all.
    shared = _shared_folder(tmp_path_factory)
    folder = shared / "foreign" / "teacher"
    with WeakFileLock(shared / "foreign.lock"):
        if not folder.exists():
            tokenizer = CHATTERS["gemma"]()
            save(make_model(layers=3, width=48, seed=4, rows=len(tokenizer)), tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def vlms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LLaVA teacher and students: one alike, one with another grid, one that ends in another width."""
    folder = tmp_path_factory.mktemp("vlms")
    return {
        "teacher": make_llava(folder / "teacher", seed=1, layers=3, width=48),
        "student": make_llava(folder / "student", seed=2),
        "fine": make_llava(folder / "fine", seed=3, image_size=16),
    }


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher and a student whose heads are not their embeddings."""
    folder, tokenizer = tmp_path_factory.mktemp("untied"), make_tokenizer()
    sizes = {"teacher": {"layers": 3, "width": 48, "seed": 1}, "student": {"seed": 2}}
    return {
        name: save(make_model(**size, rows=len(tokenizer), tied=False), tokenizer, folder / name)
        for name, size in sizes.items()
    }


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A student with experts."""
    return experts(tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="session")
def pair_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cache of the teacher of pairs."""
    return cached_teacher(tmp_path_factory.mktemp("pair_cache"))


@pytest.fixture(scope="session")
def ranks(
    tiny: dict[str, Path],
    foreign: Path,
    vlms: dict[str, Path],
    untied: dict[str, Path],
    mixture: str,
    pair_cache: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, list[dict[str, Any]]]:
    """What two ranks saw of every method under DDP and FSDP2; started once, since a start takes ten seconds.

    `folder` is a job's output folder.
    """
    folder = tmp_path_factory.mktemp("ranks")
    models: dict[str, dict[str, Any]] = {
        "sft": tiny,
        "kd": tiny,
        "taid": tiny,
        "comd": tiny,
        "alm": {**tiny, "teacher": foreign},
        "llava_kd": vlms,
    }
    jobs: dict[str, dict[str, Any]] = {
        f"{method} {how}": {"method": method, "how": how, **pair}
        for method, pair in models.items()
        for how in ("ddp", "fsdp2")
    }
    balanced = {"ce_weight": 0.3, "combine": "gradmag"}
    jobs["kd balanced"] = {"method": "kd", "how": "ddp", **tiny, "settings": balanced}
    first = {"settings": {**balanced, "gradient_checkpointing": True}, "evaluate_first": True}
    jobs["kd fsdp2 balanced"] = {"method": "kd", "how": "fsdp2", **tiny, **first}
    jobs["llava_kd balanced"] = {"method": "llava_kd", "how": "ddp", **vlms, "settings": {"combine": "gradmag"}}
    for how in ("ddp", "fsdp2"):
        switched = {"switch": {"weight": 2.0}, "activation_checkpointing": True}
        jobs[f"llava_kd switch {how}"] = {"method": "llava_kd", "how": how, **vlms, "settings": switched}
        jobs[f"kd features {how}"] = {"method": "kd", "how": how, **tiny, "settings": {"features": FEATURES}}
        jobs[f"kd experts {how}"] = {"method": "kd", "how": how, "student": mixture, "teacher": tiny["teacher"]}
    sparse = {"sparse_density": 0.08, "sparse_from": tuned(tiny["student"], folder / "tuned"), "weight_decay": 0.1}
    jobs["kd sparse ddp"] = {"method": "kd", "how": "ddp", **tiny, "settings": sparse}
    jobs["trans_encoder ddp"] = {"method": "trans_encoder", "how": "ddp"}
    jobs["dho ddp"] = {"method": "dho", "how": "ddp"}
    jobs["dho terms ddp"] = {"method": "dho", "how": "ddp", "settings": BATCH_TERMS}
    halved = {"per_device_train_batch_size": 1, "unlabeled_batch_size": 2, "gradient_accumulation_steps": 2}
    jobs["dho terms parts ddp"] = {"method": "dho", "how": "ddp", "settings": {**BATCH_TERMS, **halved}}
    every = {f"{term}_weight": 0.5 for term in TERMS}
    jobs["tower_kd ddp"] = {"method": "tower_kd", "how": "ddp", "settings": every}
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **EVERY_TERM, **ORDERS}
    jobs["clip_kd ddp"] = {"method": "clip_kd", "how": "ddp", "settings": parts}
    pairs = {**parts, "save_strategy": "steps", "save_steps": 2}
    adapted = {"method": "clip_kd", "how": "fsdp2", "lora": ADAPTER, "settings": pairs}
    jobs["clip_kd fsdp2 lora"] = adapted
    checkpoint = folder / "runs" / "clip_kd-fsdp2-lora" / "out" / "checkpoint-2"
    jobs["clip_kd fsdp2 lora resumed"] = {**adapted, "resume": checkpoint}
    jobs["clip_kd masked ddp"] = {"method": "clip_kd", "how": "ddp", "settings": MASKED}
    cached = {**parts, **SCORED}
    jobs["clip_kd cached ddp"] = {"method": "clip_kd", "how": "ddp", "settings": cached, "cache": pair_cache}
    kd = {"method": "kd", "how": "fsdp2", **untied}
    chunks = {"chunk_size": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
    jobs["kd fsdp2 in chunks"] = {**kd, "settings": chunks}
    jobs["kd fsdp2 in bf16"] = {**kd, "settings": {"bf16": True}}
    taid = {"method": "taid", "how": "fsdp2", **tiny}
    jobs["taid fsdp2 saved"] = {**taid, "settings": {"save_strategy": "steps", "save_steps": 2}, "save": True}
    checkpoint = folder / "runs" / "taid-fsdp2-saved" / "checkpoint-2"
    jobs["taid fsdp2 resumed"] = {**taid, "resume": checkpoint}
    between = {"max_steps": 5, "logging_steps": 4, "save_strategy": "steps", "save_steps": 3}
    counted = {"method": "kd", "how": "ddp", **tiny, "settings": between}
    jobs["kd counted"] = counted
    jobs["kd counted resumed"] = {**counted, "resume": folder / "runs" / "kd-counted" / "checkpoint-3"}
    adapted = {"method": "kd", "how": "fsdp2", **tiny, "lora": LORA}
    jobs["kd fsdp2 lora saved"] = {**adapted, "settings": {"save_strategy": "steps", "save_steps": 2}, "save": True}
    checkpoint = folder / "runs" / "kd-fsdp2-lora-saved" / "checkpoint-2"
    jobs["kd fsdp2 lora resumed"] = {**adapted, "resume": checkpoint}
    kept = {"self_teacher": "ema", "ema_decay": 0.5, "ce_weight": 0.5, "save_strategy": "steps", "save_steps": 2}
    own = {
        "method": "kd",
        "how": "fsdp2",
        "student": tiny["student"],
        "teacher": "self",
        "settings": {**kept, **chunks},
    }
    jobs["kd self fsdp2"] = own
    jobs["kd self fsdp2 resumed"] = {**own, "resume": folder / "runs" / "kd-self-fsdp2" / "checkpoint-2"}
    jobs["kd self ddp"] = {**own, "how": "ddp", "settings": {**kept, **chunks, "self_teacher": "base"}}
    several = {"student": tiny["student"], "teacher": {"a": str(tiny["teacher"]), "b": str(untied["teacher"])}}
    for how in ("ddp", "fsdp2"):
        jobs[f"kd several {how}"] = {"method": "kd", "how": how, "column": None, **several}
        jobs[f"kd routed {how}"] = {"method": "kd", "how": how, "column": "domain", **several}
    jobs["alm routed ddp"] = {
        "method": "alm",
        "how": "ddp",
        "column": "domain",
        "student": tiny["student"],
        "teacher": {"a": str(tiny["teacher"]), "b": str(foreign)},
    }
    jobs["llava_kd routed ddp"] = {
        "method": "llava_kd",
        "how": "ddp",
        "column": "domain",
        "student": vlms["student"],
        "teacher": {"a": str(vlms["teacher"]), "b": str(vlms["fine"])},
        "settings": {"visual_mismatch": "pool"},
    }
    paths = {
        name: {key: str(value) if isinstance(value, Path) else value for key, value in job.items()}
        for name, job in jobs.items()
    }
    found, folder = _once_for_all_workers(tmp_path_factory, paths, folder)
    for name, seen in found.items():
        for rank in seen:
            rank["folder"] = folder / "runs" / name.replace(" ", "-")
    return found


def _shared_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder of this run for all of pytest-xdist's workers."""
    own = factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def _once_for_all_workers(
    factory: pytest.TempPathFactory, jobs: dict[str, dict[str, Any]], folder: Path
) -> tuple[dict[str, list[dict[str, Any]]], Path]:
    """What two ranks saw, and in which folder, for the first of pytest-xdist's workers; the others wait for it."""
    shared = _shared_folder(factory)
    path = shared / "ranks.json"
    with WeakFileLock(shared / "ranks.lock"):
        if not path.is_file():
            path.write_text(json.dumps([on_two_ranks(jobs, folder), str(folder)]))
        found, made_in = json.loads(path.read_text())
    return found, Path(made_in)
