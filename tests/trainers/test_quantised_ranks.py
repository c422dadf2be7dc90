"""Quantised students on several ranks: the losses of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from mmkd.methods.kd import KDTrainer
from tests.experts import experts
from tests.forked import on_two_ranks
from tests.helpers import LORA, Build, losses_of

DORA = {**LORA, "use_dora": True}
KINDS: dict[str, dict[str, Any]] = {
    "int4": {},
    "int8": {},
    "nvfp4": {},
    "int4 lora": {"lora": LORA},
    "nvfp4 dora": {"lora": DORA},
    "int4 experts": {},
    "int8 experts": {},
}


def job_of(kind: str, how: str, tiny: dict[str, Path], mixture: str) -> dict[str, Any]:
    settings = {"student_quantization": kind.split()[0]}
    if "int4" in kind:
        settings |= {"student_quantization_group": 16}
    student = mixture if "experts" in kind else str(tiny["student"])
    return {"method": "kd", "how": how, "student": student, "teacher": "self", "settings": settings, **KINDS[kind]}


def expected_steps(build: Build, completions: Dataset, job: dict[str, Any]) -> list[Any]:
    """Of one rank that takes as parts what two ranks take at a time."""
    torch.manual_seed(0)
    adapter = {"peft_config": LoraConfig(**job["lora"])} if "lora" in job else {}
    parts = {"max_length": 128, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    model = {"model": job["student"], "teacher": "self", **adapter}
    alone = build(KDTrainer, completions, model, **parts, **job["settings"])
    alone.train()
    return list(zip(losses_of(alone), losses_of(alone, "grad_norm"), strict=True))


def check(build: Build, completions: Dataset, jobs: dict[str, Any], folder: Path, steps: int = 4) -> None:
    for name, seen in on_two_ranks(jobs, folder, DS_ACCELERATOR="cpu").items():
        expected = expected_steps(build, completions, jobs[name])
        assert expected[0][0] > 1e-6, name
        for rank in seen:
            # After a step, sums in another order may round a weight to the neighbouring code.
            assert rank["steps"][0] == pytest.approx(expected[0], rel=1e-3), name
            assert rank["steps"][:steps] == [pytest.approx(step, rel=0.2) for step in expected[:steps]], name


@pytest.fixture
def mixture(tmp_path: Path) -> str:
    """A student of experts."""
    return str(experts(tmp_path, "qwen3_moe"))


def test_losses_do_not_depend_on_ranks(
    build: Build, completions: Dataset, tiny: dict[str, Path], mixture: str, tmp_path: Path
) -> None:
    jobs = {f"{kind} {how}": job_of(kind, how, tiny, mixture) for kind in KINDS for how in ("ddp", "fsdp2")}
    check(build, completions, jobs, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["zero2", "zero3"])
def test_losses_do_not_depend_on_ranks_of_zero(
    build: Build, completions: Dataset, tiny: dict[str, Path], mixture: str, tmp_path: Path, how: str
) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not among mmkd's dependencies")
    # ZeRO-3 gathers the weights of one layer at a time.
    kinds = ["int4", "int8"] if how == "zero3" else KINDS
    # DeepSpeed's optimizer is another.
    check(build, completions, {kind: job_of(kind, how, tiny, mixture) for kind in kinds}, tmp_path, steps=1)
