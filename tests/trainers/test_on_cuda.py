"""Runs of every method on a pretended GPU: nothing is left on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from mmkd.methods.dho.unseen_classes import UnseenClasses
from mmkd.teachers.several import SeveralTeachers
from mmkd.training.method import METHODS
from tests.classes import BATCH_TERMS, dho, pictures, signals_of_terms, vit
from tests.helpers import LORA, Build, losses_of
from tests.pairs import captioned, clip_kd
from tests.pretended_cuda import pretended_cuda
from tests.towers import teachers, tower_kd
from tests.vlms import vision_rows

GENERATES = {"on_policy_fraction": 0.5, "rollout_max_tokens": 8}
ALM = {"teacher": "foreign", "chunks": "all"}
CASES: dict[str, dict[str, Any]] = {
    "sft": {},
    "kd": {},
    "kd without a log": {"logging_steps": 10},
    "kd tempered": {"ce_weight": 0.3, "temperature": 2.0, "divergence": "jsd"},
    "kd precise": {"precise_logits": True, "model_init_kwargs": {"dtype": "bfloat16"}},
    "kd adaptive": {"divergence": "adaptive_kl"},
    "kd skewed": {"divergence": "skew_reverse_kl"},
    "kd balanced": {"ce_weight": 0.3, "combine": "gradmag"},
    "kd packed": {"data": "texts", "packing": True, "packing_strategy": "wrapped", "max_length": 32},
    "kd padding-free": {"padding_free": True, "max_length": None},
    "kd on policy": GENERATES,
    "kd several": {"teacher": None},
    "kd routed": {"teacher": "domain"},
    "kd lora": {"lora": True, "activation_checkpointing": True},
    "kd vlm": {"data": "images", "on_bad_row": "skip"},
    "kd vlm on policy": {"data": "images", **GENERATES},
    "taid": {},
    "taid on policy": GENERATES,
    "alm merge": {**ALM, "chunks": "merge", "ce_weight": 0.5, "hidden_weight": 1.0, "combine": "gradmag"},
    "alm all": ALM,
    "alm uld": {**ALM, "objective": "uld"},
    "alm mined": {**ALM, "objective": "mined"},
    "alm on policy": {**ALM, **GENERATES},
    "llava_kd": {"data": "images"},
    "llava_kd balanced": {"data": "images", "combine": "gradmag"},
    "llava_kd pooled": {"data": "images", "teacher": "fine", "visual_mismatch": "pool", "relation_on": "hidden"},
}


@pytest.fixture
def make(build: Build, tiny: Any, vlms: Any, foreign: Path, completions: Dataset, texts: Dataset) -> Any:
    """The trainer of a case."""

    def made(case: str) -> Any:
        settings = dict(CASES[case])
        models = {name: str(path) for name, path in tiny.items()}
        data: Any = {"texts": texts, "images": None}.get(settings.pop("data", ""), completions)
        if data is None:
            models, data = {name: str(path) for name, path in vlms.items()}, vision_rows([1, 2, 0, 1, 1, 1, 0, 2])
            settings |= {"assistant_only_loss": True, "max_length": 128}
        teacher: Any = settings.pop("teacher", "teacher")
        if teacher in (None, "domain"):
            data = data.add_column("domain", ["a", "b"] * (len(data) // 2))
            teachers = {"a": models["teacher"], "b": models["student"]}
            teacher = SeveralTeachers(teachers, column=teacher)
        else:
            teacher = str(foreign) if teacher == "foreign" else models[teacher]
        run: dict[str, Any] = {"max_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
        run |= settings
        arguments = {"model": models["student"], "teacher": teacher, "eval_dataset": data.select(range(4))}
        arguments |= {"peft_config": LoraConfig(**LORA)} if run.pop("lora", False) else {}
        return build(METHODS[case.split()[0]].trainer, data, trainer=arguments, **run)

    return made


@pytest.mark.parametrize("case", CASES)
def test_a_run_on_a_gpu(make: Any, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def steps() -> tuple[list[float], float]:
        trainer = make(case)
        assert trainer.model.device == trainer.args.device
        trainer.train()
        return losses_of(trainer, "loss"), trainer.evaluate()["eval_loss"]

    here = steps()
    with pretended_cuda(monkeypatch):
        there = steps()
    assert there == (pytest.approx(here[0], rel=1e-4), pytest.approx(here[1], rel=1e-4))


@pytest.mark.parametrize("objective", ["dho", "kd", "ce"])
def test_a_run_of_two_heads(objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"unlabeled_batch_size": 0} if objective == "ce" else {}

    def losses() -> list[float]:
        trainer: Any = dho(tmp_path, {"model": new}, objective=objective, conflict_steps=1, **settings)
        trainer.train()
        return losses_of(trainer, "loss")

    new = vit()
    here, new = losses(), vit()
    with pretended_cuda(monkeypatch):
        assert losses() == pytest.approx(here, rel=1e-4)


def test_a_run_of_two_heads_with_further_terms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def losses() -> list[float]:
        unseen = UnseenClasses(pictures(2, seed=2), torch.eye(3, 12))
        given: dict[str, Any] = {"model": vit(), "teacher": signals_of_terms(), "unseen": unseen}
        trainer: Any = dho(tmp_path, given, conflict_steps=1, **BATCH_TERMS)
        trainer.train()
        return [*losses_of(trainer, "loss"), trainer.unseen_accuracy()]

    here = losses()
    with pretended_cuda(monkeypatch):
        assert losses() == pytest.approx(here, rel=1e-4)


def test_a_run_of_towers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def losses() -> list[float]:
        trainer: Any = tower_kd(tmp_path, {"teachers": teachers(), "eval_dataset": pictures(1)}, frequency_weight=0.5)
        trainer.train()
        return [*losses_of(trainer, "loss"), trainer.evaluate()["eval_loss"]]

    here = losses()
    with pretended_cuda(monkeypatch):
        assert losses() == pytest.approx(here, rel=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_of_dual_encoders(accumulation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def losses() -> list[float]:
        sizes = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
        trainer: Any = clip_kd(tmp_path, {"eval_dataset": captioned(8)}, **sizes)
        trainer.train()
        return [*losses_of(trainer, "loss"), trainer.evaluate()["eval_loss"]]

    here = losses()
    with pretended_cuda(monkeypatch):
        assert losses() == pytest.approx(here, rel=1e-4)
